"""The table from logical axes to mesh axes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from megatransformer_jax.config.loop import MeshConfig
from megatransformer_jax.sharding.mesh import make_mesh
from megatransformer_jax.sharding.rules import MESH_AXES, Sharder, ShardingRules


def test_spec_follows_the_table():
    rules = ShardingRules()
    assert rules.spec("embed", "kv_heads", None) == PartitionSpec("fsdp", "tensor", None)
    assert rules.spec("batch", "length", None) == PartitionSpec(("data", "fsdp"), "sequence", None)


def test_every_entry_names_mesh_axes():
    for field in dataclasses.fields(ShardingRules):
        axes = getattr(ShardingRules(), field.name)
        for axis in (axes,) if isinstance(axes, str) else axes or ():
            assert axis in MESH_AXES


def test_without_drops_one_mesh_axis_everywhere():
    rules = ShardingRules().without("fsdp")
    assert rules.spec("embed", "heads", "batch") == PartitionSpec(None, "tensor", "data")


def test_unknown_axes_are_named_with_the_known_ones():
    with pytest.raises(ValueError, match=r"unknown logical axis 'widht'; known: .*embed"):
        ShardingRules().spec("widht")


def test_a_sharder_without_a_mesh_changes_nothing():
    array = jnp.ones((3, 5))
    assert Sharder().constrain(array, "batch", "embed") is array
    assert Sharder().gather_params({"w": array}, {"w": ("embed", None)})["w"] is array
    with pytest.raises(ValueError, match="without a mesh"):
        Sharder().sharding("batch")


def test_constrain_and_gather_lay_out_by_the_table():
    sharder = Sharder(make_mesh(MeshConfig(data=2, fsdp=2, tensor=2), jax.devices()))
    weight = jax.device_put(jnp.arange(32.0).reshape(8, 4), sharder.sharding("embed", "mlp"))
    assert weight.addressable_shards[0].data.shape == (4, 2)
    gathered = jax.jit(lambda w: sharder.gather_params(w, ("embed", "mlp")))(weight)
    assert gathered.addressable_shards[0].data.shape == (8, 2)
    np.testing.assert_array_equal(gathered, weight)
    with pytest.raises(ValueError, match="does not have the axes"):
        sharder.constrain(weight, "embed")
