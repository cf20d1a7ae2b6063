"""Rows of sequences that advance at different speeds, against a list of tokens per sequence."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from megatransformer_jax.config.layers import AttentionConfig
from megatransformer_jax.config.loop import MeshConfig
from megatransformer_jax.config.model import ModelConfig
from megatransformer_jax.nn.cache_rows import put_rows, write_staggered_rows
from megatransformer_jax.nn.kv_cache import CacheShape, constrain_cache, init_cache
from megatransformer_jax.sharding.mesh import make_mesh
from megatransformer_jax.sharding.rules import Sharder

B, T, SLOTS = 3, 4, 2
CONFIG = ModelConfig(width=16, core_layers=2, attention=AttentionConfig(num_heads=2))
PARTS = (CONFIG.prelude_layers, CONFIG.core_layers, CONFIG.coda_layers)
write = jax.jit(write_staggered_rows, static_argnums=5)


def empty_cache(batch_size):
    return init_cache(
        CONFIG,
        CacheShape(batch_size, 64, num_slots=SLOTS, dtype=jnp.dtype(jnp.float32), platform="cpu"),
    )


def some_rows(layers, seed, batch_size=B):
    shape = (layers, batch_size, 2, T, 16)
    return jnp.asarray(np.random.default_rng(seed).normal(0, 1, shape), jnp.float32)


def test_every_sequence_fills_its_own_rows():
    cache = empty_cache(B)
    starts = np.zeros(B, np.int32)
    wanted = [[] for _ in range(B)]
    for turn, kept in enumerate(([2, 0, 4], [1, 1, 0], [0, 4, 1], [3, 0, 2])):
        rows = tuple(some_rows(layers, 10 * turn + layers) for layers in PARTS)
        steps = np.random.default_rng(turn).integers(1, 9, (B, T)).astype(np.int32)
        is_kept = jnp.arange(T) < jnp.asarray(kept)[:, None]
        cache = write(cache, rows, jnp.asarray(steps), is_kept, jnp.asarray(starts), Sharder())
        for row in range(B):
            wanted[row] += [
                (*(part[:, row, :, j] for part in rows), steps[row, j]) for j in range(kept[row])
            ]
        starts += np.asarray(kept, np.int32)
    assert cache.next_position.tolist() == [6, 5, 7]
    assert int(cache.length) == 7
    for row, rows in enumerate(wanted):
        places = [*range(len(rows)), *[-1] * (64 - len(rows))]
        assert cache.positions[row].tolist() == places
        assert cache.num_steps[row, len(rows) :].tolist() == [0] * (64 - len(rows))
        for j, (prelude, core, coda, steps) in enumerate(rows):
            np.testing.assert_array_equal(cache.prelude[:, row, :, j], prelude)
            np.testing.assert_array_equal(cache.coda[:, row, :, j], coda)
            assert cache.num_steps[row, j] == steps
            slots = cache.core[:, row, :, j].reshape(SLOTS, CONFIG.core_layers, 2, 16)
            for slot in slots:
                np.testing.assert_array_equal(slot, core)


@pytest.mark.parametrize("num_rows", [1, 5, 16, 17, 64])
def test_whole_tiles_hold_the_same_rows(num_rows):
    """As a TPU writes them; what stands around them stays."""
    rng = np.random.default_rng(num_rows)
    array = jnp.asarray(rng.normal(size=(2, 2, 1, 64, 4)), jnp.float32)
    rows = jnp.asarray(rng.normal(size=(2, 1, 1, num_rows, 4)), jnp.float32)
    put = jax.jit(put_rows, static_argnums=3)
    for start in {0, 15, 16, 31, 64 - num_rows}:
        start = min(start, 64 - num_rows)
        wanted = np.array(array)
        wanted[:, 1:, :, start : start + num_rows] = rows
        for lanes in (1, 128):
            got = put(array, rows, (0, 1, jnp.int32(start)), lanes)
            np.testing.assert_array_equal(got, wanted)


def test_devices_of_a_mesh_write_their_own_sequences():
    """Nothing is sent but numbers."""
    sharder = Sharder(make_mesh(MeshConfig(data=2, fsdp=2, tensor=2), jax.devices()))
    rows = tuple(some_rows(layers, layers, 4) for layers in PARTS)
    steps, starts = jnp.ones((4, T), jnp.int32), jnp.asarray([3, 0, 9, 1], jnp.int32)
    is_kept = jnp.arange(T) < jnp.asarray([[2], [4], [0], [1]])
    wanted = write(empty_cache(4), rows, steps, is_kept, starts, Sharder())

    def write_all(cache, *arguments):
        return write_staggered_rows(constrain_cache(sharder, cache), *arguments, sharder)

    got = jax.jit(write_all)(empty_cache(4), rows, steps, is_kept, starts)
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_array_equal(one, other)
    assert got.core.addressable_shards[0].data.shape == (4, 1, 1, 64, 16)
