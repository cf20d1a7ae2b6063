"""Writes new rows to a cache, for every sequence at a place of its own.

`kv_cache.write_rows` writes all sequences at one place, so that sequences which advance at
different speeds would leave gaps. Positions say what a row holds, so a sequence's rows may stand
anywhere: here each sequence fills its rows without gaps.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from megatransformer_jax.nn.kv_cache import KeyValues, KVCache
from megatransformer_jax.sharding.rules import Sharder


def write_staggered_rows(
    cache: KVCache,
    prelude: KeyValues,
    core: KeyValues,
    coda: KeyValues,
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
      prelude: T new rows, [layers, B, K, T, H].
      core: [layers, B, K, T, H]; every slot gets them, so that a reader of any iteration finds what
        the token offered last.
      coda: [layers, B, K, T, H].
      num_steps: iterations of the tokens.
      is_kept: in each sequence a first part of the rows; maybe none.
      starts: row of each sequence's first token.
      sharder: where the sequences are.
    """
    assert cache.core is not None
    count = jnp.sum(is_kept, axis=1, dtype=jnp.int32)
    positions = cache.next_position[:, None] + jnp.arange(is_kept.shape[1], dtype=jnp.int32)
    old = (cache.prelude, cache.core, cache.coda, cache.positions, cache.num_steps)
    new = (
        prelude,
        _in_every_slot(core, cache.num_slots),
        coda,
        jnp.where(is_kept, positions, -1),
        jnp.where(is_kept, num_steps, 0),
    )
    put: Any = _put(old, new, starts, sharder)
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


def _in_every_slot(rows: KeyValues, num_slots: int) -> KeyValues:
    repeats = (num_slots, 1, 1, 1, 1)
    return KeyValues(jnp.tile(rows.key, repeats), jnp.tile(rows.value, repeats))


def _put(old: Any, new: Any, starts: jax.Array, sharder: Sharder) -> Any:
    """Arrays [E, B, K, S, H] or [B, S] with T new rows of each sequence at its start."""
    arrays, tree = jax.tree.flatten(old)
    rows = jax.tree.leaves(new)
    put = _put_here
    if sharder.mesh is not None:
        # Each device writes its own sequences; the compiler would bring all of them together.
        specs = [_spec(array, sharder) for array in arrays]
        put = jax.shard_map(
            _put_here,
            mesh=sharder.mesh,
            in_specs=(specs, specs, sharder.rules.spec("batch")),
            out_specs=specs,
            check_vma=False,
        )
    return jax.tree.unflatten(tree, put(arrays, rows, starts))


def _spec(array: jax.Array, sharder: Sharder) -> jax.sharding.PartitionSpec:
    if array.ndim == 5:
        return sharder.rules.spec(None, "batch", "kv_heads", None, None)
    return sharder.rules.spec("batch", None)


def _put_here(arrays: list[jax.Array], rows: list[jax.Array], starts: jax.Array) -> list[jax.Array]:
    # One by one this is done in place; as a scatter XLA transposes the cache for it.
    def put_sequence(sequence: jax.Array, arrays: list[jax.Array]) -> list[jax.Array]:
        start = starts[sequence]

        def put_one(array: jax.Array, new: jax.Array) -> jax.Array:
            has_entries = array.ndim == 5
            one = jax.lax.dynamic_slice_in_dim(new, sequence, 1, axis=int(has_entries))
            at: tuple[Any, ...] = (sequence, start)
            if has_entries:
                at = (0, sequence, 0, start, 0)
            return jax.lax.dynamic_update_slice(array, one.astype(array.dtype), at)

        return [put_one(array, new) for array, new in zip(arrays, rows, strict=True)]

    written: list[jax.Array] = jax.lax.fori_loop(0, starts.shape[0], put_sequence, arrays)
    return written
