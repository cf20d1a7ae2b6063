"""Arrays of a generation on a mesh and off it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from megatransformer_jax.config.layers import AttentionConfig
from megatransformer_jax.config.loop import MeshConfig
from megatransformer_jax.config.model import ModelConfig
from megatransformer_jax.generation.placement import (
    constrain_rows,
    fetch,
    for_rows,
    put_rows,
    replicate,
)
from megatransformer_jax.models.megatransformer import build_model
from megatransformer_jax.sharding.mesh import make_mesh
from megatransformer_jax.sharding.rules import Sharder
from megatransformer_jax.types import DTypePolicy


@pytest.fixture(scope="module")
def sharder():
    return Sharder(make_mesh(MeshConfig(data=2, fsdp=2, tensor=2), jax.devices()))


def test_rows_are_cut_over_the_batch_axes(sharder):
    assert sharder.ways("batch") == 4
    array = put_rows(sharder, jnp.arange(24).reshape(8, 3))
    assert array.addressable_shards[0].data.shape == (2, 3)
    np.testing.assert_array_equal(array, np.arange(24).reshape(8, 3))


def test_replicated_arrays_are_everywhere_and_fetched_ones_are_on_the_host(sharder):
    everywhere = replicate(sharder, {"a": np.arange(3), "b": jnp.float32(2)})
    assert all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(everywhere))
    assert len(everywhere["a"].addressable_shards) == 8
    fetched = fetch(sharder, (put_rows(sharder, jnp.arange(8)), everywhere["b"]))
    assert all(isinstance(leaf, np.ndarray) for leaf in fetched)
    np.testing.assert_array_equal(fetched[0], np.arange(8))
    assert fetched[1] == 2


def test_keys_stay_keys(sharder):
    keys = jax.random.split(jax.random.key(3), 4)
    put = put_rows(sharder, keys)
    assert put.dtype == keys.dtype and put.addressable_shards[0].data.shape == (1,)
    drawn = jax.vmap(jax.random.bits)
    np.testing.assert_array_equal(drawn(put), drawn(keys))


def test_constraints_cut_the_first_axis(sharder):
    arrays = {"a": jnp.ones((4, 2)), "b": jnp.ones(8)}
    cut = jax.jit(lambda tree: constrain_rows(sharder, tree))(arrays)
    shapes = {name: array.addressable_shards[0].data.shape for name, array in cut.items()}
    assert shapes == {"a": (1, 2), "b": (2,)}


def test_without_a_mesh_arrays_are_left_alone():
    tree = {"a": jnp.arange(3)}
    assert Sharder().ways("batch") == 1
    for function in (put_rows, replicate, constrain_rows):
        assert function(Sharder(), tree) is tree
    assert isinstance(fetch(Sharder(), tree)["a"], np.ndarray)


@pytest.mark.parametrize(
    ("kernel", "wanted"), [("xla", "xla"), ("auto", "auto"), ("splash", "auto")]
)
def test_the_model_is_laid_out_for_its_rows(sharder, kernel, wanted):
    config = ModelConfig(attention=AttentionConfig(kernel=kernel))
    model = build_model(config, DTypePolicy(), sharder, "tpu")
    for num_rows, batch in ((4, ("data", "fsdp")), (6, None)):
        ours = for_rows(model, num_rows)
        assert ours == for_rows(model, num_rows), "else it would be compiled again"
        assert hash(ours) == hash(for_rows(model, num_rows))
        rules = ours.sharder.rules
        assert rules == dataclasses.replace(sharder.rules, batch=batch, length=None)
        assert ours.config.attention.kernel == wanted
