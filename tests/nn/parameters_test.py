"""Spread of fresh weights by role against the papers' formulas."""

import dataclasses

import flax.errors
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from megatransformer_jax.config.layers import AttentionConfig
from megatransformer_jax.config.model import InitConfig, MlpConfig, ModelConfig
from megatransformer_jax.config.recurrence import RecurrenceConfig
from megatransformer_jax.models.megatransformer import (
    abstract_params,
    build_model,
    init_params,
)
from megatransformer_jax.nn.parameters import weight_init
from megatransformer_jax.sharding.rules import Sharder
from megatransformer_jax.types import DTypePolicy

CONFIG = ModelConfig(
    vocab_size=512,
    width=64,
    prelude_layers=1,
    core_layers=2,
    coda_layers=1,
    tie_embeddings=False,
    attention=AttentionConfig(num_heads=4),
    mlp=MlpConfig(hidden_width=96),
    recurrence=RecurrenceConfig(mean_steps=5, core_width=32),
)
DEPTH = 1 + 5 * 2 + 1  # Layers that a token passes at the mean number of iterations.
# What is left of a normal variable's standard deviation when it is cut at three of them.
CUT = 0.98658


def takase(width):
    """(input matrices, outputs into the stream): sqrt(2 / 5h), sqrt(1 / 5hl) of 2502.05171."""
    return (2 / (5 * width)) ** 0.5, (1 / (5 * width * DEPTH)) ** 0.5


FORMULAS = {
    "normal": lambda width: (0.03, 0.03),
    "scaled": lambda width: (
        0.03,
        0.03 / (2 * DEPTH) ** 0.5,
    ),  # GPT-2: N residual layers = 2 depth.
    "takase": takase,
}


@pytest.mark.parametrize("scheme", FORMULAS)
def test_every_role_has_the_spread_of_its_formula(scheme):
    init = InitConfig(scheme=scheme, **({} if scheme == "takase" else {"std": 0.03}))
    config = dataclasses.replace(CONFIG, init=init)
    model = build_model(config, DTypePolicy(), Sharder(), "cpu")
    params = init_params(model, jax.random.key(0))
    outer, core = FORMULAS[scheme](64), FORMULAS[scheme](32)
    # (weights, width, what is wanted)
    for layers, (reads, writes) in (
        (params["prelude"], outer), (params["coda"], outer), (params["core"]["layers"], core)
    ):  # fmt: skip
        for layer in layers.values():
            for module, reading, writing in (("attention", "qkv", "output"), ("mlp", "up", "down")):
                for name, std in ((reading, reads), (writing, writes)):
                    measured = np.std(layer[module][name]) / CUT
                    # Four standard errors of a standard deviation.
                    error = 4 / (2 * layer[module][name].size) ** 0.5
                    assert measured == pytest.approx(std, rel=error), (module, name)
    embedding = params["embedding"]["embedding"]
    assert np.std(embedding) / CUT == pytest.approx(outer[0], rel=4 / (2 * embedding.size) ** 0.5)


def test_zero_outputs_start_every_layer_as_the_identity():
    plain, zero = (
        dataclasses.replace(CONFIG, init=InitConfig(zero_outputs=is_zero))
        for is_zero in (False, True)
    )
    expected, params = (
        init_params(build_model(config, DTypePolicy(), Sharder(), "cpu"), jax.random.key(0))
        for config in (plain, zero)
    )

    def check(path, found, other):
        is_output = path[-1].key in ("output", "down")
        np.testing.assert_array_equal(found, np.zeros_like(other) if is_output else other)

    jax.tree_util.tree_map_with_path(check, params, expected)


def test_sharing_changes_no_depth():
    """A shared layer writes into the stream as often as layers of their own would."""
    shared = dataclasses.replace(
        CONFIG, sharing=dataclasses.replace(CONFIG.sharing, scheme="cycle", core_unique=1)
    )
    assert weight_init(shared, 64) == weight_init(CONFIG, 64)


@pytest.mark.parametrize("part", ["prelude", "core"])
def test_a_parameter_of_another_shape_is_named(part):
    model = build_model(CONFIG, DTypePolicy(), Sharder(), "cpu")

    def widen(path, leaf):
        keys = [key.key for key in path]
        is_the_one = keys[0] == part and keys[-2:] == ["attention", "output"]
        return jax.ShapeDtypeStruct((7, 7), leaf.dtype) if is_the_one else leaf

    params = jax.tree_util.tree_map_with_path(widen, abstract_params(model))
    tokens = jax.ShapeDtypeStruct((1, 4), jnp.int32)
    key = jax.random.key(0)
    with pytest.raises(flax.errors.ScopeParamShapeError, match=r"\(7, 7\)"):
        jax.eval_shape(
            lambda params, tokens: model.apply(
                {"params": params}, tokens, num_steps=2, rngs={"state": key}
            ),
            params,
            tokens,
        )
