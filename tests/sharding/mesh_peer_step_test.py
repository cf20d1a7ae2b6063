"""A training step with PEER on a mesh equals the single-device one, statistics included."""

import dataclasses

import jax
import numpy as np
import pytest
from sharded_step import assert_equal_steps, run_config, sharded

from megatransformer_jax.config.layers import PeerConfig
from megatransformer_jax.config.loop import MeshConfig
from megatransformer_jax.config.model import MlpConfig
from megatransformer_jax.config.option import ConfigError
from megatransformer_jax.nn import peer as peer_module
from megatransformer_jax.sharding.mesh import check_run_fits_mesh, make_mesh
from megatransformer_jax.sharding.rules import Sharder


def with_peer(num_experts):
    config = run_config()
    peer = PeerConfig(num_experts=num_experts, num_heads=2, top_k=2, key_dim=4)
    mlp = MlpConfig(kind="peer", peer=peer)
    model = dataclasses.replace(config.model, prelude_layers=0, coda_layers=0, mlp=mlp)
    return dataclasses.replace(config, model=model)


def test_a_sharded_step_equals_the_single_device_one(monkeypatch):
    # Several blocks of tokens: 2 rows per device, 4 experts per token of width 16, 4 columns.
    monkeypatch.setattr(peer_module, "MAX_GATHERED", 2 * 4 * 16 * 4)
    config = with_peer(36)
    assert_equal_steps(config, "tensor")
    _, before, after, _ = sharded(config, "tensor")
    old, new = (state.params["core"]["layers"]["layer_0"]["mlp"] for state in (before, after))
    for leaf in ("expert_in", "expert_out", "query", "keys", "query_mean", "query_var"):
        assert np.max(np.abs(np.asarray(new[leaf]) - np.asarray(old[leaf]))) > 1e-4, leaf
    assert new["expert_in"].addressable_shards[0].data.shape == (18, 8)


def test_experts_must_divide_over_the_tensor_axis():
    mesh = make_mesh(MeshConfig(data=4, tensor=2), jax.devices())
    check_run_fits_mesh(with_peer(36), mesh)
    with pytest.raises(ConfigError, match="num_experts: 25 is not divisible by the 2 devices"):
        check_run_fits_mesh(with_peer(25), mesh)


def test_ways_are_the_parts_of_an_axis():
    sharder = Sharder(make_mesh(MeshConfig(data=2, fsdp=2, tensor=2), jax.devices()))
    assert [sharder.ways(name) for name in ("batch", "experts", "core_out")] == [4, 2, 1]
    assert Sharder().ways("batch") == 1
