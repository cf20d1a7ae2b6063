"""Omegas against the paper's formula in NumPy, layer by layer."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from megatransformer_jax.config.layers import AttentionConfig
from megatransformer_jax.config.model import MlpConfig, ModelConfig, NormConfig
from megatransformer_jax.config.recurrence import RecurrenceConfig
from megatransformer_jax.models.core import initial_state
from megatransformer_jax.models.megatransformer import (
    build_model,
    init_params,
    layer_context,
    open_pass,
)
from megatransformer_jax.models.passes.observed import profile_admin
from megatransformer_jax.nn.attention import SelfAttention
from megatransformer_jax.nn.context import LayerContext
from megatransformer_jax.nn.mlp import Mlp
from megatransformer_jax.nn.parameters import weight_init
from megatransformer_jax.ops.masks import AttentionMask
from megatransformer_jax.sharding.rules import Sharder
from megatransformer_jax.types import DTypePolicy

CONFIG = ModelConfig(
    vocab_size=16,
    width=8,
    max_length=8,
    prelude_layers=2,
    core_layers=1,
    coda_layers=1,
    attention=AttentionConfig(num_heads=2),
    mlp=MlpConfig(hidden_width=12),
    norm=NormConfig(placement="post"),
    recurrence=RecurrenceConfig(state_init="normal"),
    residual="admin",
)
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 16, (2, 6)), jnp.int32)
POSITIONS = jnp.broadcast_to(jnp.arange(6), (2, 6))
SEGMENTS = jnp.asarray([[1, 1, 1, 2, 2, 0], [1, 1, 1, 1, 0, 0]], jnp.int32)


def build(config):
    model = build_model(config, DTypePolicy(), Sharder(), "cpu")
    return model, init_params(model, jax.random.key(0))


def variance(x):
    return np.var(np.asarray(x, np.float64)[np.asarray(SEGMENTS) > 0])


def walk(config, layers, x, width):
    """Variances of a stream's input and of each update with all omegas 1, and where it ends."""
    context = layer_context(
        config, POSITIONS, AttentionMask(True, None, 0, SEGMENTS, SEGMENTS), width
    )
    rest = (weight_init(config, width), DTypePolicy(), Sharder(), "cpu")
    seen = [variance(x)]
    for layer in layers:
        for name in ("attention", "mlp"):
            weights = {"params": layer[name]}
            if name == "attention":
                update = SelfAttention(config, *rest).apply(weights, x, context)
            else:
                update = Mlp(config.mlp, *rest[:2]).apply(weights, x, True)
            seen.append(variance(update))
            x = x + update
            x = x / jnp.sqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + config.norm.eps)
    return seen, x


def omegas(layers):
    return [
        np.asarray(layer[f"{name}_residual_scale"])
        for layer in layers
        for name in ("attention", "mlp")
    ]


def check(layers, variances):
    wanted = [1.0, *np.sqrt(np.cumsum(variances)[1:-1])]
    for omega, number in zip(omegas(layers), wanted, strict=True):
        np.testing.assert_allclose(omega, number, rtol=1e-4)


def test_omegas_are_the_papers_formula():
    model, params = build(CONFIG)
    key = jax.random.key(3)
    profiled = profile_admin(model, params, TOKENS, POSITIONS, SEGMENTS, key)
    assert all(np.all(omega == 1) for omega in omegas([params["prelude"]["layer_1"]]))

    prelude = [params["prelude"][f"layer_{layer}"] for layer in range(2)]
    embedded = params["embedding"]["embedding"][TOKENS]
    variances, x = walk(CONFIG, prelude, embedded, 8)
    check([profiled["prelude"][f"layer_{layer}"] for layer in range(2)], variances)

    core = open_pass(model, params, x, LayerContext(AttentionMask(is_causal=True)))
    state = initial_state(CONFIG, key, core.injected)
    state = core.core.bind({"params": core.params}).adapter(state, core.prepared)
    core = [params["core"]["layers"]["layer_0"]]
    variances, x = walk(CONFIG, core, state, 8)
    check([profiled["core"]["layers"]["layer_0"]], variances)

    x = x / jnp.sqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + CONFIG.norm.eps)
    variances, _ = walk(CONFIG, [params["coda"]["layer_0"]], x, 8)
    check([profiled["coda"]["layer_0"]], variances)

    # Nothing else changes.
    kept = jax.tree_util.tree_map_with_path(
        lambda path, a, b: path[-1].key.endswith("residual_scale") or a is b, params, profiled
    )
    assert all(jax.tree.leaves(kept))


def test_without_a_core_prelude_and_coda_are_one_stream():
    plain = dataclasses.replace(CONFIG, core_layers=0, recurrence=RecurrenceConfig())
    model, params = build(plain)
    profiled = profile_admin(model, params, TOKENS, POSITIONS, SEGMENTS, jax.random.key(3))
    layers = [params["prelude"]["layer_0"], params["prelude"]["layer_1"], params["coda"]["layer_0"]]
    variances, _ = walk(plain, layers, params["embedding"]["embedding"][TOKENS], 8)
    stacks = (profiled["prelude"]["layer_0"], profiled["prelude"]["layer_1"])
    check([*stacks, profiled["coda"]["layer_0"]], variances)


def test_other_residuals_have_nothing_to_profile():
    model, params = build(dataclasses.replace(CONFIG, residual="plain"))
    assert not any("residual_scale" in name for name in params["prelude"]["layer_0"])
    with pytest.raises(ValueError, match="'plain'"):
        profile_admin(model, params, TOKENS, POSITIONS, SEGMENTS, jax.random.key(3))
