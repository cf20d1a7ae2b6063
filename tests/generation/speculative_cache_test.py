"""Kept rows stand one behind the other, in each sequence at its own pace."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_model import tiny

from megatransformer_jax.config.loop import MeshConfig
from megatransformer_jax.generation.placement import put_rows
from megatransformer_jax.nn.cache_rows import keep_rows, sequence_ends
from megatransformer_jax.nn.kv_cache import CacheShape, constrain_cache, init_cache, write_rows
from megatransformer_jax.sharding.mesh import make_mesh
from megatransformer_jax.sharding.rules import Sharder

PREFIX, NUM_ROWS = 5, 4
NO_MESH = Sharder()
CONFIG = tiny(attention={"num_kv_heads": 2})


def marked_rows(entries, positions, num_rows):
    """Keys and values that tell entry, sequence, head and position."""
    num_entries, batch_size, heads, _, width = entries.shape
    shape = (num_entries, batch_size, heads, num_rows, width // 2)
    place = np.asarray(positions, np.float32)[None, :, None, :, None]
    numbers = sum(
        scale
        * np.arange(size, dtype=np.float32).reshape([-1 if i == axis else 1 for i in range(5)])
        for axis, (scale, size) in enumerate(zip((1e4, 1e3, 100, 0, 0), shape, strict=True))
    )
    marked = np.broadcast_to(numbers + place, shape)
    return jnp.concatenate([marked, -marked], axis=-1)


write = jax.jit(write_rows)


def one_pass(cache, is_token):
    """The cache after a pass of marked rows."""
    num_rows = is_token.shape[1]
    positions = np.asarray(cache.next_position)[:, None] + np.cumsum(is_token, axis=1) - 1
    positions = np.where(is_token, positions, -1).astype(np.int32)
    parts = [
        marked_rows(part, positions, num_rows) for part in (cache.prelude, cache.core, cache.coda)
    ]
    steps = jnp.asarray(np.where(is_token, positions + 7, 0), jnp.int32)
    return write(cache, tuple(parts), jnp.asarray(positions), steps)


def check(cache, lengths):
    """Each sequence has its tokens, in rows without a gap."""
    positions = np.asarray(cache.positions)
    for sequence, length in enumerate(lengths):
        rows = np.flatnonzero(positions[sequence] >= 0)
        np.testing.assert_array_equal(positions[sequence, rows], np.arange(length))
        np.testing.assert_array_equal(rows, rows[0] + np.arange(length))
        np.testing.assert_array_equal(
            np.asarray(cache.num_steps)[sequence, rows], np.arange(length) + 7
        )
        for part in (cache.prelude, cache.core, cache.coda):
            wanted = marked_rows(part, np.tile(np.arange(length), (len(lengths), 1)), length)
            np.testing.assert_array_equal(
                np.asarray(part)[:, sequence][:, :, rows], np.asarray(wanted)[:, sequence]
            )
    np.testing.assert_array_equal(cache.next_position, lengths)


@functools.partial(jax.jit, static_argnames="sharder")
def keep(cache, ends, num_kept, sharder=NO_MESH):
    return keep_rows(cache, ends, num_kept, NUM_ROWS, sharder)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_rounds_leave_no_gaps(batch_size):
    rng = np.random.default_rng(0)
    cache = init_cache(
        CONFIG,
        CacheShape(batch_size, 64, num_slots=2, dtype=jnp.dtype(jnp.float32), platform="cpu"),
    )
    lengths = np.array([PREFIX, 2, 3])[:batch_size]
    cache = one_pass(cache, np.arange(PREFIX) >= PREFIX - lengths[:, None])
    ends = sequence_ends(cache)
    np.testing.assert_array_equal(ends, [PREFIX] * batch_size)
    for number in range(12):
        # The last sequence has ended after a while and passes padding.
        is_running = np.arange(3)[:batch_size] < (3 if number < 4 else 2)
        num_tokens = rng.integers(1, NUM_ROWS + 1, batch_size) * is_running
        num_kept = np.array([rng.integers(0, most + 1) for most in num_tokens])
        cache = one_pass(cache, np.arange(NUM_ROWS) < num_tokens[:, None])
        cache = keep(cache, ends, jnp.asarray(num_kept, jnp.int32))
        ends, lengths = ends + num_kept, lengths + num_kept
        check(cache, lengths)
        np.testing.assert_array_equal(sequence_ends(cache), ends)
        assert int(cache.length) == np.max(ends)
    assert batch_size == 1 or len(set(lengths.tolist())) == 3


def test_an_empty_cache_has_no_rows():
    cache = init_cache(
        CONFIG, CacheShape(2, 64, num_slots=1, dtype=jnp.dtype(jnp.float32), platform="cpu")
    )
    np.testing.assert_array_equal(sequence_ends(cache), [0, 0])


def test_devices_of_a_mesh_move_their_own_sequences():
    """Nothing is sent but numbers."""
    sharder = Sharder(make_mesh(MeshConfig(data=2, fsdp=2, tensor=2), jax.devices()))
    cache = init_cache(
        CONFIG, CacheShape(4, 64, num_slots=2, dtype=jnp.dtype(jnp.float32), platform="cpu")
    )
    ends, num_kept = jnp.int32([5, 3, 5, 2]), jnp.int32([2, 4, 0, 1])
    cache = one_pass(cache, np.arange(5) < np.asarray(ends)[:, None])
    cache = one_pass(cache, np.ones((4, NUM_ROWS), bool))
    wanted = keep(cache, ends, num_kept)
    check(wanted, [7, 7, 5, 3])
    placed = jax.jit(constrain_cache, static_argnums=0)(sharder, cache)
    got = keep(placed, *put_rows(sharder, (ends, num_kept)), sharder)
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_array_equal(one, other)
    leaves, tree = jax.tree.flatten(placed)

    def keep_leaves(leaves, *numbers):
        return jax.tree.leaves(keep_rows(tree.unflatten(leaves), *numbers, NUM_ROWS, sharder))

    program = jax.jit(keep_leaves).lower(leaves, *put_rows(sharder, (ends, num_kept))).compile()
    for operation in ("all-gather", "all-to-all", "collective-permute"):
        assert operation not in program.as_text()
