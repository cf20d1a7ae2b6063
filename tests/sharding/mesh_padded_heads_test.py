"""Heads that the mesh axis tensor does not divide: filled up where they are computed alone."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from sharded_step import assert_equal_steps, run_config, sharded, single_device

from megatransformer_jax.config.generation import GenerationConfig
from megatransformer_jax.config.layers import AttentionConfig, ValueEmbeddingConfig
from megatransformer_jax.config.loop import MeshConfig
from megatransformer_jax.config.option import ConfigError
from megatransformer_jax.generation.generator import Generator
from megatransformer_jax.models.megatransformer import build_model, init_params, param_axes
from megatransformer_jax.sharding.mesh import make_mesh, make_sharder
from megatransformer_jax.sharding.rules import Sharder
from megatransformer_jax.types import DTypePolicy

DEPTH = 3


def config_with(accumulation=1, **attention):
    """Five key/value heads for ten query heads, with everything that has a row per head."""
    config = run_config(accumulation=accumulation)
    options = {"num_heads": 10, "num_kv_heads": 5, "head_dim": 4} | attention
    heads = AttentionConfig(**options, qkv_bias=True, qk_bias=True, qk_norm=True)
    positions = dataclasses.replace(config.model.positions, scheme="alibi")
    model = dataclasses.replace(config.model, attention=heads, positions=positions)
    return dataclasses.replace(config, model=model)


@pytest.mark.parametrize(
    ("mesh_name", "accumulation", "part"),
    [("tensor of 4", 1, (8, 5, 4, 1)), ("tensor and sequence", 2, (16, 5, 4, 2))],
)
def test_a_step_equals_the_single_device_one_with_parameters_of_the_same_shape(
    mesh_name, accumulation, part
):
    config = config_with(accumulation)
    assert_equal_steps(config, mesh_name)
    _, before, after, _ = sharded(config, mesh_name)
    alone = single_device(config)[0]
    for state in (before, after):
        assert jax.tree.map(np.shape, state.params) == jax.tree.map(np.shape, alone.params)
    qkv = after.params["core"]["layers"]["layer_0"]["attention"]["qkv"]
    assert qkv.addressable_shards[0].data.shape == part


@functools.cache
def completions(mesh):
    config = config_with(num_heads=11, num_kv_heads=None).model
    sharder = Sharder() if mesh is None else make_sharder(config, make_mesh(mesh, jax.devices()))
    model = build_model(config, DTypePolicy(), sharder, "cpu")
    params = init_params(build_model(config, DTypePolicy(), Sharder(), "cpu"), jax.random.key(0))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: np.float32(x + 0.3 * rng.standard_normal(x.shape)), params)
    if mesh is not None:
        places = jax.tree.map(lambda _, axes: sharder.sharding(*axes), params, param_axes(model))
        params = jax.device_put(params, places)
    options = GenerationConfig.of(max_new_tokens=4, exit_criterion="latent_diff", seed=1)
    generator = Generator(model, params, None, options, DEPTH)
    return [(text.token_ids, text.depths) for text in generator.generate([[1, 2, 3], [4]])]


def test_texts_are_those_of_one_device():
    assert completions(MeshConfig(fsdp=2, tensor=4)) == completions(None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_heads": 3, "num_kv_heads": 3}, "3 is not .* there are fewer of them"),
        ({"head_dim": 6}, "4 does not divide the width 6 of a head either"),
        ({"qk_norm_span": "width"}, "qk_norm_span='width' normalises all of them"),
    ],
)
def test_what_cannot_be_filled_up_is_an_error(changes, message):
    mesh = make_mesh(MeshConfig(fsdp=2, tensor=4), jax.devices())
    with pytest.raises(ConfigError, match=message) as caught:
        make_sharder(config_with(**changes).model, mesh)
    assert caught.value.path == "model.attention.num_kv_heads"


def test_value_embeddings_need_heads_that_divide():
    model = dataclasses.replace(
        config_with().model, value_embedding=ValueEmbeddingConfig(layers=(0,), gate_channels=4)
    )
    mesh = make_mesh(MeshConfig(fsdp=2, tensor=4), jax.devices())
    with pytest.raises(ConfigError, match="the model has value embeddings"):
        make_sharder(model, mesh)
