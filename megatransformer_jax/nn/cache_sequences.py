"""A cache whose sequences come and go, each with its rows at its tokens' positions, without gaps.

What a sequence's row holds is then told by one number, `next_position`: rows below it are in use,
and what stands behind it is seen by nobody. So a sequence is emptied, or begins as another one has,
by a number; rows are written for one sequence, or for some, and those of the others stay.

Everything here is done in place if the cache is donated. On a mesh each device writes and copies
what it holds, and a sequence that others need is sent to them.
"""

import functools
from typing import Any, cast

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Int

from megatransformer_jax.nn.cache_rows import entries_spec, put_rows
from megatransformer_jax.nn.kv_cache import KVCache
from megatransformer_jax.sharding.rules import Sharder

_SLOTS_AT_A_TIME = 8


def with_positions(
    cache: KVCache, next_position: Int[Array, "B"], is_live: Bool[Array, "B"]
) -> KVCache:
    """The cache whose sequences have so many rows; only those that are live must be read."""
    columns = jnp.arange(cache.capacity, dtype=jnp.int32)
    changed: Any = cache.replace(  # type: ignore[attr-defined]
        positions=jnp.where(columns < next_position[:, None], columns, -1),
        next_position=next_position,
        length=jnp.max(jnp.where(is_live, next_position, 0)),
    )
    return cast(KVCache, changed)


@struct.dataclass
class NewRows:
    """New pairs of every stack.

    Attributes:
      outer: of prelude and coda.
      core: of the core's slots; None without a core.
      num_slots: slots of the core that may ever be read, for each sequence: iterations that its
        tokens may take. What the others hold does not matter, so they are not written.
    """

    outer: tuple[jax.Array, jax.Array]
    core: jax.Array | None
    num_slots: Int[Array, "B"]


def write_tokens(
    cache: KVCache,
    rows: NewRows,
    num_steps: Int[Array, "B"],
    is_written: Bool[Array, "B"],
    sharder: Sharder,
) -> KVCache:
    """Entries and steps of one token per sequence at `next_position`, which stays as it is.

    Slots that a token has not reached hold what its last iteration offered.

    Args:
      cache: before.
      rows: sequences first: [B, E, K, 1, P]; of the core's at least the slots that were reached.
      num_steps: iterations of the tokens.
      is_written: sequences that have a token; nothing of the others is touched.
      sharder: where the sequences are.
    """
    old = ((cache.prelude, cache.coda), cache.core)
    put: Any = functools.partial(_put_tokens, cache.num_slots, cache.lanes)
    if sharder.mesh is not None:
        axes = ("batch", None, "kv_heads", None, None)
        put = _on_each_device(put, old, rows, axes, (sharder.rules.spec("batch"),) * 3, sharder)
    starts = cache.next_position
    (prelude, coda), core = put(old, rows, starts, num_steps, is_written)
    columns = jnp.where(is_written, starts, cache.capacity)
    place = jax.vmap(lambda row, column, value: row.at[column].set(value, mode="drop"))
    written: Any = cache.replace(  # type: ignore[attr-defined]
        prelude=prelude,
        core=core,
        coda=coda,
        num_steps=place(cache.num_steps, columns, num_steps),
    )
    return cast(KVCache, written)


def _put_tokens(
    num_slots: int,
    lanes: int,
    old: Any,
    rows: NewRows,
    starts: jax.Array,
    num_steps: jax.Array,
    is_written: jax.Array,
) -> Any:
    """What `write_tokens` does with the sequences of one device."""
    size = _slots_at_a_time(num_slots)
    # Those that have a token come first; a loop over them costs nothing for the others.
    order = jnp.argsort(~is_written)

    def put_one(turn: jax.Array, old: Any) -> Any:
        sequence = order[turn]
        start = starts[sequence]

        def put_entries(array: jax.Array, one: jax.Array) -> jax.Array:
            new = one[sequence][:, None].astype(array.dtype)
            return put_rows(array, new, (0, sequence, start), lanes)

        def put_slots(block: jax.Array, core: Any) -> Any:
            slots = block * size + jnp.arange(size)
            slots = jnp.minimum(slots, jnp.maximum(num_steps[sequence], 1) - 1)

            def put_some(array: jax.Array, one: jax.Array) -> jax.Array:
                layers, shape = array.shape[0] // num_slots, one.shape[2:]
                by_slot = one.reshape(one.shape[0], -1, layers, *shape)
                new = by_slot[sequence, slots].reshape(size * layers, 1, *shape)
                corner = (block * size * layers, sequence, start)
                return put_rows(array, new.astype(array.dtype), corner, lanes)

            return jax.tree.map(put_some, core, rows.core)

        outer, core = old
        outer = jax.tree.map(put_entries, outer, rows.outer)
        if core is not None:
            num_read = jnp.minimum(rows.num_slots[sequence], num_slots)
            core = jax.lax.fori_loop(0, -(-num_read // size), put_slots, core)
        return outer, core

    return jax.lax.fori_loop(0, jnp.sum(is_written, dtype=jnp.int32), put_one, old)


def _on_each_device(
    put: Any, old: Any, rows: NewRows, axes: tuple[str | None, ...], others: Any, sharder: Sharder
) -> Any:
    """`put(old, rows, ...)` of what each device holds.

    Args:
      put: gives new entries for the old ones.
      old: entries of the cache.
      rows: new ones.
      axes: of these; arrays with fewer have the first.
      others: specs of the other arguments.
      sharder: where all are.
    """
    old_leaves, old_tree = jax.tree.flatten(old)
    row_leaves, row_tree = jax.tree.flatten(rows)

    def put_leaves(old: list[jax.Array], rows: list[jax.Array], *others: Any) -> list[jax.Array]:
        trees = jax.tree.unflatten(old_tree, old), jax.tree.unflatten(row_tree, rows)
        return jax.tree.leaves(put(*trees, *others))

    entries = [entries_spec(array, sharder) for array in old_leaves]
    new = [sharder.rules.spec(*axes[: array.ndim]) for array in row_leaves]
    mapped = jax.shard_map(
        put_leaves,
        mesh=sharder.mesh,
        in_specs=(entries, new, *others),
        out_specs=entries,
        check_vma=False,
    )
    return lambda old, rows, *others: jax.tree.unflatten(
        old_tree, mapped(jax.tree.leaves(old), jax.tree.leaves(rows), *others)
    )


def _slots_at_a_time(num_slots: int) -> int:
    """How many are written together: some, so that loops are short, but few to no purpose."""
    return max(size for size in range(1, _SLOTS_AT_A_TIME + 1) if num_slots % size == 0)


def view_sequence(cache: KVCache, sequence: Int[Array, ""], sharder: Sharder) -> KVCache:
    """What a pass of one sequence reads; on a mesh a copy of it that every device has.

    Args:
      cache: of all.
      sequence: which; all of its rows in use are read.
      sharder: where the sequences are.
    """
    length = cache.next_position[sequence]
    if sharder.mesh is None:
        view: Any = cache.replace(  # type: ignore[attr-defined]
            length=length, sequence=sequence
        )
        return cast(KVCache, view)
    old = (cache.prelude, cache.core, cache.coda)
    arrays, tree = jax.tree.flatten(old)
    axes = sharder.rules.spec("batch")[0]

    def take(arrays: list[jax.Array], sequence: jax.Array) -> list[jax.Array]:
        local, is_mine = _local(sequence, arrays[0].shape[1], axes)
        found = [jax.lax.dynamic_slice_in_dim(array, local, 1, axis=1) for array in arrays]
        if axes is None:
            return found
        return [jax.lax.psum(jnp.where(is_mine, one, 0), axes) for one in found]

    taken = jax.shard_map(
        take,
        mesh=sharder.mesh,
        in_specs=([entries_spec(array, sharder) for array in arrays], sharder.rules.spec()),
        out_specs=[sharder.rules.spec(None, None, "kv_heads", None, None)] * len(arrays),
        check_vma=False,
    )(arrays, sequence)
    prelude, core, coda = jax.tree.unflatten(tree, taken)
    view = cache.replace(  # type: ignore[attr-defined]
        prelude=prelude,
        core=core,
        coda=coda,
        positions=cache.positions[sequence][None],
        num_steps=cache.num_steps[sequence][None],
        next_position=length[None],
        length=length,
        is_medium=None if cache.is_medium is None else cache.is_medium[sequence][None],
    )
    return cast(KVCache, view)


def write_sequence(
    cache: KVCache,
    rows: NewRows,
    sequence: Int[Array, ""],
    start: Int[Array, ""],
    num_kept: Int[Array, ""],
    sharder: Sharder,
) -> KVCache:
    """Entries of the first `num_kept` of T new tokens of one sequence, from row `start` on.

    Args:
      cache: of all sequences; positions and steps stay as they are.
      rows: [E, 1, K, T, P], T at most the capacity; of one sequence.
      sequence: which.
      start: row of the first token.
      num_kept: how many there are; what stands in the other rows stays.
      sharder: where the sequences are.
    """
    old = ((cache.prelude, cache.coda), cache.core)
    size = rows.outer[0].shape[3]
    # A window that would reach over the end begins earlier, and its tokens stand later in it.
    corner = jnp.minimum(start, cache.capacity - size)
    shift = start - corner
    columns = jnp.arange(size)
    is_kept = (columns >= shift) & (columns < shift + num_kept)
    source = jnp.maximum(columns - shift, 0)
    axes = None if sharder.mesh is None else sharder.rules.spec("batch")[0]
    put: Any = functools.partial(_put_sequence, cache.num_slots, axes)
    if sharder.mesh is not None:
        whole = sharder.rules.spec()
        others = (whole, whole, (whole, whole))
        put = _on_each_device(put, old, rows, (None, None, "kv_heads", None, None), others, sharder)
    (prelude, coda), core = put(old, rows, sequence, corner, (is_kept, source))
    written: Any = cache.replace(  # type: ignore[attr-defined]
        prelude=prelude, core=core, coda=coda
    )
    return cast(KVCache, written)


def _put_sequence(
    num_slots: int,
    axes: Any,
    old: Any,
    rows: NewRows,
    sequence: jax.Array,
    corner: jax.Array,
    columns: tuple[jax.Array, jax.Array],
) -> Any:
    """What `write_sequence` does on one device; the columns' are which count, and their tokens."""
    local, is_mine = _local(sequence, jax.tree.leaves(old)[0].shape[1], axes)
    is_kept, source = columns
    is_kept = (is_kept & is_mine)[:, None]

    def put_entries(
        array: jax.Array, new: jax.Array, first: jax.Array | int = 0, count: int | None = None
    ) -> jax.Array:
        count = array.shape[0] if count is None else count
        new = jax.lax.dynamic_slice_in_dim(new, first, count).astype(array.dtype)
        new, at = jnp.take(new, source, axis=3), (first, local, 0, corner, 0)
        there = jax.lax.dynamic_slice(array, at, new.shape)
        return jax.lax.dynamic_update_slice(array, jnp.where(is_kept, new, there), at)

    outer, core = old
    outer = jax.tree.map(put_entries, outer, rows.outer)
    if core is None:
        return outer, core
    size = _slots_at_a_time(num_slots)
    count = size * core.shape[0] // num_slots

    def put_slots(block: jax.Array, core: Any) -> Any:
        return jax.tree.map(
            lambda array, new: put_entries(array, new, block * count, count), core, rows.core
        )

    num_read = jnp.minimum(rows.num_slots[0], num_slots)
    return outer, jax.lax.fori_loop(0, -(-num_read // size), put_slots, core)


def copy_rows(
    cache: KVCache,
    source: Int[Array, ""],
    target: Int[Array, ""],
    num_rows: Int[Array, ""],
    sharder: Sharder,
) -> KVCache:
    """Entries and steps of a sequence's first rows as another has them, some rows at a time.

    Args:
      cache: of all; positions stay as they are.
      source: the sequence that is copied.
      target: the one that gets its rows; what stands in the others stays.
      num_rows: how many, from the first.
      sharder: where the sequences are.
    """
    old = (cache.prelude, cache.core, cache.coda)
    arrays, tree = jax.tree.flatten(old)
    size = cache.block_rows or cache.capacity
    axes = None if sharder.mesh is None else sharder.rules.spec("batch")[0]

    def copy(
        arrays: list[jax.Array], source: jax.Array, target: jax.Array, num_rows: jax.Array
    ) -> list[jax.Array]:
        num_local = arrays[0].shape[1]
        here, has_source = _local(source, num_local, axes)
        there, has_target = _local(target, num_local, axes)

        def copy_block(block: jax.Array, arrays: list[jax.Array]) -> list[jax.Array]:
            start = block * size
            is_kept = (has_target & (start + jnp.arange(size) < num_rows))[:, None]

            def copy_one(array: jax.Array) -> jax.Array:
                entries, _, heads, _, width = array.shape
                shape = (entries, 1, heads, size, width)
                rows = jax.lax.dynamic_slice(array, (0, here, 0, start, 0), shape)
                if axes is not None:
                    rows = jax.lax.psum(jnp.where(has_source, rows, 0), axes)
                at = (0, there, 0, start, 0)
                rows = jnp.where(is_kept, rows, jax.lax.dynamic_slice(array, at, shape))
                return jax.lax.dynamic_update_slice(array, rows, at)

            return [copy_one(array) for array in arrays]

        num_blocks = (num_rows + size - 1) // size
        copied: list[jax.Array] = jax.lax.fori_loop(0, num_blocks, copy_block, arrays)
        return copied

    if sharder.mesh is not None:
        spec = sharder.rules.spec()
        entries = [entries_spec(array, sharder) for array in arrays]
        copy = jax.shard_map(
            copy,
            mesh=sharder.mesh,
            in_specs=(entries, spec, spec, spec),
            out_specs=entries,
            check_vma=False,
        )
    num_rows = jnp.asarray(num_rows)
    prelude, core, coda = jax.tree.unflatten(tree, copy(arrays, source, target, num_rows))
    is_copied = jnp.arange(cache.capacity) < num_rows
    steps = jnp.where(is_copied, cache.num_steps[source], cache.num_steps[target])
    copied: Any = cache.replace(  # type: ignore[attr-defined]
        prelude=prelude,
        core=core,
        coda=coda,
        num_steps=cache.num_steps.at[target].set(steps),
    )
    return cast(KVCache, copied)


def _local(sequence: jax.Array, num_local: int, axes: Any) -> tuple[jax.Array, Any]:
    """Number of a sequence among those of this device, and whether it is one of them."""
    if axes is None:
        return sequence, True
    own = sequence - jax.lax.axis_index(axes) * num_local
    return jnp.clip(own, 0, num_local - 1), (own >= 0) & (own < num_local)
