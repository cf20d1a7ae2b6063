"""Rows of sequences that advance at different speeds, against a list of tokens per sequence."""

import jax
import jax.numpy as jnp
import numpy as np

from megatransformer_jax.config.layers import AttentionConfig
from megatransformer_jax.config.loop import MeshConfig
from megatransformer_jax.config.model import ModelConfig
from megatransformer_jax.nn.cache_rows import write_staggered_rows
from megatransformer_jax.nn.kv_cache import CacheShape, KeyValues, constrain_cache, init_cache
from megatransformer_jax.sharding.mesh import make_mesh
from megatransformer_jax.sharding.rules import Sharder

B, T, SLOTS = 3, 4, 2
CONFIG = ModelConfig(width=16, core_layers=2, attention=AttentionConfig(num_heads=2))
PARTS = (CONFIG.prelude_layers, CONFIG.core_layers, CONFIG.coda_layers)
write = jax.jit(write_staggered_rows, static_argnums=7)


def empty_cache(batch_size):
    return init_cache(
        CONFIG,
        CacheShape(batch_size, 64, num_slots=SLOTS, dtype=jnp.dtype(jnp.float32), platform="cpu"),
    )


def some_rows(layers, seed, batch_size=B):
    shape = (layers, batch_size, 2, T, 8)
    key, value = np.random.default_rng(seed).normal(0, 1, (2, *shape)).astype(np.float32)
    return KeyValues(jnp.asarray(key), jnp.asarray(value))


def test_every_sequence_fills_its_own_rows():
    cache = empty_cache(B)
    starts = np.zeros(B, np.int32)
    wanted = [[] for _ in range(B)]
    for turn, kept in enumerate(([2, 0, 4], [1, 1, 0], [0, 4, 1], [3, 0, 2])):
        prelude, core, coda = (some_rows(layers, 10 * turn + layers) for layers in PARTS)
        steps = np.random.default_rng(turn).integers(1, 9, (B, T)).astype(np.int32)
        is_kept = jnp.arange(T) < jnp.asarray(kept)[:, None]
        cache = write(
            cache, prelude, core, coda, jnp.asarray(steps), is_kept, jnp.asarray(starts), Sharder()
        )
        for row in range(B):
            wanted[row] += [
                (prelude.key[:, row, :, j], core.value[:, row, :, j], coda.key[:, row, :, j],
                 steps[row, j])
                for j in range(kept[row])
            ]  # fmt: skip
        starts += np.asarray(kept, np.int32)
    assert cache.next_position.tolist() == [6, 5, 7]
    assert int(cache.length) == 7
    for row, rows in enumerate(wanted):
        places = [*range(len(rows)), *[-1] * (64 - len(rows))]
        assert cache.positions[row].tolist() == places
        assert cache.num_steps[row, len(rows) :].tolist() == [0] * (64 - len(rows))
        for j, (prelude_key, core_value, coda_key, steps) in enumerate(rows):
            np.testing.assert_array_equal(cache.prelude.key[:, row, :, j], prelude_key)
            np.testing.assert_array_equal(cache.coda.key[:, row, :, j], coda_key)
            assert cache.num_steps[row, j] == steps
            slots = cache.core.value[:, row, :, j].reshape(SLOTS, CONFIG.core_layers, 2, 8)
            for slot in slots:
                np.testing.assert_array_equal(slot, core_value)


def test_devices_of_a_mesh_write_their_own_sequences():
    """Nothing is sent but numbers."""
    sharder = Sharder(make_mesh(MeshConfig(data=2, fsdp=2, tensor=2), jax.devices()))
    rows = [some_rows(layers, layers, 4) for layers in PARTS]
    steps, starts = jnp.ones((4, T), jnp.int32), jnp.asarray([3, 0, 9, 1], jnp.int32)
    is_kept = jnp.arange(T) < jnp.asarray([[2], [4], [0], [1]])
    wanted = write(empty_cache(4), *rows, steps, is_kept, starts, Sharder())

    def write_all(cache, *arguments):
        return write_staggered_rows(constrain_cache(sharder, cache), *arguments, sharder)

    got = jax.jit(write_all)(empty_cache(4), *rows, steps, is_kept, starts)
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_array_equal(one, other)
    assert got.core.key.addressable_shards[0].data.shape == (4, 1, 1, 64, 8)
