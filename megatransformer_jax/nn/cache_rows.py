"""Moves rows of a key/value cache: sequences of unequal speed, beams, accepted drafts.

`kv_cache.write_rows` writes all sequences at one place. Positions say what a row holds, so the rows
of a sequence may stand anywhere; the functions here use that.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from megatransformer_jax.nn.kv_cache import KVCache, NewPairs, drop_rows
from megatransformer_jax.sharding.rules import Sharder

# ------------------------------------------------------------------------------
# Sequences that advance at different speeds: each fills its own rows, without gaps.


def write_staggered_rows(
    cache: KVCache,
    rows: NewPairs,
    num_steps: Int[Array, "B T"],
    is_kept: Bool[Array, "B T"],
    starts: Int[Array, "B"],
    sharder: Sharder,
) -> KVCache:
    """The cache with the first rows of each sequence, as many as `is_kept` says.

    All T rows are copied. What is not kept has no position, so nobody sees it, and the next write
    goes over it; therefore T rows must fit behind every start. The caller has checked that.

    Args:
      cache: before.
      rows: of the T tokens. The core's are [layers, B, K, T, P], and every slot gets them, so that
        a reader of any iteration finds what the token offered last.
      num_steps: iterations of the tokens.
      is_kept: in each sequence a first part of the rows; maybe none.
      starts: row of each sequence's first token.
      sharder: where the sequences are.
    """
    prelude, core, coda = rows
    assert core is not None
    count = jnp.sum(is_kept, axis=1, dtype=jnp.int32)
    positions = cache.next_position[:, None] + jnp.arange(is_kept.shape[1], dtype=jnp.int32)
    old = (cache.prelude, cache.core, cache.coda, cache.positions, cache.num_steps)
    new = (
        prelude,
        jnp.tile(core, (cache.num_slots, 1, 1, 1, 1)),
        coda,
        jnp.where(is_kept, positions, -1),
        jnp.where(is_kept, num_steps, 0),
    )
    put: Any = _put(old, new, starts, cache.lanes, sharder)
    written: Any = cache.replace(  # type: ignore[attr-defined]
        prelude=put[0],
        core=put[1],
        coda=put[2],
        positions=put[3],
        num_steps=put[4],
        next_position=cache.next_position + count,
        length=jnp.maximum(cache.length, jnp.max(starts + count)),
    )
    return written


def _put(old: Any, new: Any, starts: jax.Array, lanes: int, sharder: Sharder) -> Any:
    """Arrays [E, B, K, S, P] or [B, S] with T new rows of each sequence at its start."""
    arrays, tree = jax.tree.flatten(old)
    rows = jax.tree.leaves(new)
    put = functools.partial(_put_here, lanes)
    if sharder.mesh is not None:
        # Each device writes its own sequences; the compiler would bring all of them together.
        specs = [entries_spec(array, sharder) for array in arrays]
        put = jax.shard_map(
            put,
            mesh=sharder.mesh,
            in_specs=(specs, specs, sharder.rules.spec("batch")),
            out_specs=specs,
            check_vma=False,
        )
    return jax.tree.unflatten(tree, put(arrays, rows, starts))


# Rows that a TPU writes at once.
_TILE_ROWS = 16


def put_rows(
    array: Float[Array, "E B K S P"],
    rows: Float[Array, "E2 1 K T P"],
    corner: tuple[Any, Any, Any],
    lanes: int,
) -> Float[Array, "E B K S P"]:
    """The array with T rows of some entries of a sequence, in place.

    A TPU writes whole tiles. To write less it would first copy the whole cache into another layout,
    so the tiles that hold the rows are read and written back instead.

    Args:
      array: of the cache.
      rows: T of them must fit behind the first.
      corner: the first entry, the sequence, and the first row.
      lanes: of the cache.
    """
    entry, sequence, start = corner
    if lanes == 1:
        return jax.lax.dynamic_update_slice(array, rows, (entry, sequence, 0, start, 0))
    num_rows, capacity = rows.shape[3], array.shape[3]
    size = min(-(-(num_rows + _TILE_ROWS - 1) // _TILE_ROWS) * _TILE_ROWS, capacity)
    first = jnp.minimum(start // _TILE_ROWS * _TILE_ROWS, capacity - size)
    at = (entry, sequence, 0, first, 0)
    tiles = jax.lax.dynamic_slice(array, at, (*rows.shape[:3], size, rows.shape[-1]))
    place = first + jnp.arange(size) - start
    if num_rows > 1:
        rows = jnp.take(rows, jnp.clip(place, 0, num_rows - 1), axis=3)
    tiles = jnp.where(((place >= 0) & (place < num_rows))[:, None], rows, tiles)
    return jax.lax.dynamic_update_slice(array, tiles, at)


def entries_spec(array: jax.Array, sharder: Sharder) -> jax.sharding.PartitionSpec:
    """How arrays [E, B, K, S, P] or [B, S] of a cache are cut."""
    if array.ndim == 5:
        return sharder.rules.spec(None, "batch", "kv_heads", None, None)
    return sharder.rules.spec("batch", None)


def _put_here(
    lanes: int, arrays: list[jax.Array], rows: list[jax.Array], starts: jax.Array
) -> list[jax.Array]:
    pairs = [place for place, array in enumerate(arrays) if array.ndim == 5]

    # One by one this is done in place; as a scatter XLA transposes the cache for it.
    def put_sequence(sequence: jax.Array, written: list[jax.Array]) -> list[jax.Array]:
        corner = (0, sequence, starts[sequence])
        ones = [jax.lax.dynamic_slice_in_dim(rows[place], sequence, 1, axis=1) for place in pairs]
        return [
            put_rows(array, one.astype(array.dtype), corner, lanes)
            for array, one in zip(written, ones, strict=True)
        ]

    written = jax.lax.fori_loop(0, starts.shape[0], put_sequence, [arrays[n] for n in pairs])
    left = iter(written)
    return [
        next(left) if place in pairs else _put_numbers(array, rows[place], starts)
        for place, array in enumerate(arrays)
    ]


def _put_numbers(
    array: Int[Array, "B S"], numbers: Int[Array, "B T"], starts: Int[Array, "B"]
) -> Int[Array, "B S"]:
    """T numbers of each sequence at its start.

    All at once: of a loop that updates a slice of an array in every turn, libtpu 0.0.42 takes the
    slices for the array ("The shape doesn't match when replacing").
    """
    place = jnp.arange(array.shape[1]) - starts[:, None]
    count = numbers.shape[1]
    put = jnp.take_along_axis(numbers, jnp.clip(place, 0, count - 1), axis=1)
    return jnp.where((place >= 0) & (place < count), put, array)


# ------------------------------------------------------------------------------
# Beams that continue other beams.


def reorder_new_rows(
    cache: KVCache, sequences: Int[Array, "B"], first_row: Int[Array, ""]
) -> KVCache:
    """What `take_sequences` gives for sequences whose rows before `first_row` are the same.

    The beams of one prompt share it, so only the rows behind it are moved, some at a time and in
    place: the cost grows with the new tokens, not with the capacity, and is nothing if all
    sequences keep their places.

    Args:
      cache: of B sequences.
      sequences: what each is to become.
      first_row: sequences that are exchanged are equal before it.
    """
    # Fewer than attention reads at a time; they divide the capacity. On CPU, for the first 64
    # tokens of 8 beams with 32 KiB per row and beam, a round took 3.1 ms with 16, 5.1 ms with 64.
    num_rows = math.gcd(cache.block_rows, cache.block_rows // 4)
    first_block = first_row // num_rows
    end_block = (cache.length + num_rows - 1) // num_rows
    is_moved = jnp.any(sequences != jnp.arange(sequences.shape[0]))

    def move_block(block: jax.Array, cache: KVCache) -> KVCache:
        def move(array: jax.Array, sequence_axis: int, row_axis: int) -> jax.Array:
            start = block * num_rows
            rows = jax.lax.dynamic_slice_in_dim(array, start, num_rows, row_axis)
            rows = jnp.take(rows, sequences, axis=sequence_axis)
            return jax.lax.dynamic_update_slice_in_dim(array, rows, start, row_axis)

        moved: Any = cache.replace(  # type: ignore[attr-defined]
            **{
                # Keys and values: [entries, B, K, S, P].
                name: jax.tree.map(lambda array: move(array, 1, 3), getattr(cache, name))
                for name in ("prelude", "core", "coda")
            },
            positions=move(cache.positions, 0, 1),
            num_steps=move(cache.num_steps, 0, 1),
        )
        return moved

    end_block = jnp.where(is_moved, end_block, first_block)
    moved: Any = jax.lax.fori_loop(first_block, end_block, move_block, cache)
    reordered: KVCache = moved.replace(next_position=cache.next_position[sequences])
    return reordered


# ------------------------------------------------------------------------------
# Keeps the accepted rows of a verification pass, without gaps between a sequence's rows.
#
# A pass writes its rows behind the longest sequence. One that has fewer would be left with a gap by
# every round, and in the worst case a batch would need draft_length + 1 rows per token. So its
# accepted rows move up to its own last row. The rows in use are then never more than those of the
# longest sequence, as if it had been decoded token by token.


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
            return _move_up(array, is_behind, start, ends, num_rows, sharder, cache.lanes)

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
    array: Float[Array, "E B K S P"],
    is_moved: Bool[Array, ""],
    start: Int[Array, ""],
    ends: Int[Array, "B"],
    num_rows: int,
    sharder: Sharder,
    lanes: int,
) -> Float[Array, "E B K S P"]:
    """Copies `num_rows` rows at `start` to each sequence's end, which is not behind it."""

    def copy_all(
        array: jax.Array, is_moved: jax.Array, start: jax.Array, ends: jax.Array
    ) -> jax.Array:
        entries, batch_size, heads, _, width = array.shape

        def copy(sequence: jax.Array, array: jax.Array) -> jax.Array:
            shape = (entries, 1, heads, num_rows, width)
            rows = jax.lax.dynamic_slice(array, (0, sequence, 0, start, 0), shape)
            return put_rows(array, rows, (0, sequence, ends[sequence]), lanes)

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
