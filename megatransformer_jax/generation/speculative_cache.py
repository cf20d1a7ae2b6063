"""Keeps the accepted rows of a verification pass, without gaps between a sequence's rows.

A pass writes its rows behind the longest sequence. One that has fewer would be left with a gap by
every round, and in the worst case a batch would need draft_length + 1 rows per token. So its
accepted rows move up to its own last row. The rows in use are then never more than those of the
longest sequence, as if it had been decoded token by token.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from megatransformer_jax.nn.kv_cache import KVCache, drop_rows
from megatransformer_jax.sharding.rules import Sharder


def sequence_ends(cache: KVCache) -> Int[Array, "B"]:
    """For each sequence, the row behind its last token."""
    rows = jnp.arange(1, cache.capacity + 1, dtype=jnp.int32)
    return jnp.max(jnp.where(cache.positions >= 0, rows, 0), axis=1)


def keep_rows(
    cache: KVCache,
    ends: Int[Array, "B"],
    num_kept: Int[Array, "B"],
    num_rows: int,
    sharder: Sharder,
) -> KVCache:
    """Forgets what is not kept of the last pass and moves the rest up.

    Args:
      cache: after a pass.
      ends: `sequence_ends` before it.
      num_kept: how many of the pass's rows each sequence keeps, the first ones.
      num_rows: rows of the pass; static.
      sharder: where the sequences are.

    Returns:
      The cache. Its sequences end at `ends + num_kept`.
    """
    start = cache.length - num_rows
    kept: Any = drop_rows(cache, jnp.arange(num_rows) < num_kept[:, None])
    if kept.positions.shape[0] > 1:
        is_behind = jnp.any((ends < start) & (num_kept > 0))

        def move(array: jax.Array) -> jax.Array:
            return _move_up(array, is_behind, start, ends, num_rows, sharder)

        def move_numbers(array: jax.Array, unused: int) -> jax.Array:
            return _move_numbers_up(array, unused, start, ends, num_kept, num_rows)

        kept = kept.replace(
            prelude=jax.tree.map(move, kept.prelude),
            core=jax.tree.map(move, kept.core),
            coda=jax.tree.map(move, kept.coda),
            positions=move_numbers(kept.positions, -1),
            num_steps=move_numbers(kept.num_steps, 0),
        )
    replaced: KVCache = kept.replace(length=jnp.max(ends + num_kept))
    return replaced


def _move_up(
    array: Float[Array, "E B K S H"],
    is_moved: Bool[Array, ""],
    start: Int[Array, ""],
    ends: Int[Array, "B"],
    num_rows: int,
    sharder: Sharder,
) -> Float[Array, "E B K S H"]:
    """Copies `num_rows` rows at `start` to each sequence's end, which is not behind it."""

    def copy_all(
        array: jax.Array, is_moved: jax.Array, start: jax.Array, ends: jax.Array
    ) -> jax.Array:
        entries, batch_size, heads, _, width = array.shape

        def copy(sequence: jax.Array, array: jax.Array) -> jax.Array:
            shape = (entries, 1, heads, num_rows, width)
            rows = jax.lax.dynamic_slice(array, (0, sequence, 0, start, 0), shape)
            corner = (0, sequence, 0, ends[sequence], 0)
            return jax.lax.dynamic_update_slice(array, rows, corner)

        # One by one this is done in place; as a scatter XLA transposes the cache for it. And a loop
        # of no turns, not a branch, as branches may copy the cache.
        return jax.lax.fori_loop(0, jnp.where(is_moved, batch_size, 0), copy, array)

    if sharder.mesh is not None:
        # Each device moves its own sequences; the compiler would bring all of them together.
        spec, nothing = sharder.rules.spec, sharder.rules.spec()
        entries = spec(None, "batch", "kv_heads", None, None)
        copy_all = jax.shard_map(
            copy_all,
            mesh=sharder.mesh,
            in_specs=(entries, nothing, nothing, spec("batch")),
            out_specs=entries,
            check_vma=False,
        )
    return copy_all(array, is_moved, start, ends)


def _move_numbers_up(
    array: Int[Array, "B S"],
    unused: int,
    start: Int[Array, ""],
    ends: Int[Array, "B"],
    num_kept: Int[Array, "B"],
    num_rows: int,
) -> Int[Array, "B S"]:
    """The same for one number per row; what is left behind becomes `unused`."""
    last = jax.lax.dynamic_slice_in_dim(array, start, num_rows, axis=1)
    columns = jnp.arange(array.shape[1])
    place = columns - ends[:, None]
    moved = jnp.take_along_axis(last, jnp.clip(place, 0, num_rows - 1), axis=1)
    cleared = jnp.where(columns >= start, unused, array)
    return jnp.where((place >= 0) & (place < num_kept[:, None]), moved, cleared)
