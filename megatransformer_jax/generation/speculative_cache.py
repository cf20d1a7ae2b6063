"""Keeps the accepted rows of a verification pass, without gaps between a sequence's rows.

A pass writes its rows behind the longest sequence. One that has fewer would be left with a gap by
every round, and in the worst case a batch would need draft_length + 1 rows per token. So its
accepted rows move up to its own last row. The rows in use are then never more than those of the
longest sequence, as if it had been decoded token by token.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from megatransformer_jax.nn.kv_cache import KVCache, drop_rows


def sequence_ends(cache: KVCache) -> Int[Array, "B"]:
    """For each sequence, the row behind its last token."""
    rows = jnp.arange(1, cache.capacity + 1, dtype=jnp.int32)
    return jnp.max(jnp.where(cache.positions >= 0, rows, 0), axis=1)


def keep_rows(
    cache: KVCache, ends: Int[Array, "B"], num_kept: Int[Array, "B"], num_rows: int
) -> KVCache:
    """Forgets what is not kept of the last pass and moves the rest up.

    Args:
      cache: after a pass.
      ends: `sequence_ends` before it.
      num_kept: how many of the pass's rows each sequence keeps, the first ones.
      num_rows: rows of the pass; static.

    Returns:
      The cache. Its sequences end at `ends + num_kept`.
    """
    start = cache.length - num_rows
    is_kept = jnp.arange(num_rows) < num_kept[:, None]
    cache = drop_rows(cache, is_kept)
    batch_size = cache.positions.shape[0]
    if batch_size > 1:
        is_behind = jnp.any((ends < start) & (num_kept > 0))
        # A loop of no turns, not a branch: branches may copy the cache.
        cache = jax.lax.fori_loop(
            0,
            jnp.where(is_behind, batch_size, 0),
            lambda row, cache: _move_up(cache, row, start, ends[row], num_rows),
            cache,
        )
    replaced: Any = cache
    kept: KVCache = replaced.replace(length=jnp.max(ends + num_kept))
    return kept


def _move_up(
    cache: KVCache, sequence: jax.Array, start: jax.Array, end: jax.Array, num_rows: int
) -> KVCache:
    """Moves rows of one sequence from `start` to `end`, which is not behind it."""

    def move(array: jax.Array) -> jax.Array:
        shape = (array.shape[0], 1, array.shape[2], num_rows, array.shape[4])
        rows = jax.lax.dynamic_slice(array, (0, sequence, 0, start, 0), shape)
        return jax.lax.dynamic_update_slice(array, rows, (0, sequence, 0, end, 0))

    def move_numbers(array: jax.Array, unused: int) -> jax.Array:
        numbers = jax.lax.dynamic_slice(array, (sequence, start), (1, num_rows))
        cleared = jnp.full((1, num_rows), unused, array.dtype)
        array = jax.lax.dynamic_update_slice(array, cleared, (sequence, start))
        return jax.lax.dynamic_update_slice(array, numbers, (sequence, end))

    replaced: Any = cache
    moved: KVCache = replaced.replace(
        prelude=jax.tree.map(move, cache.prelude),
        core=jax.tree.map(move, cache.core),
        coda=jax.tree.map(move, cache.coda),
        positions=move_numbers(cache.positions, -1),
        num_steps=move_numbers(cache.num_steps, 0),
    )
    return moved
