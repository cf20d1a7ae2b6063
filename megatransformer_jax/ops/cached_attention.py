"""Attention of new tokens to a cache and to each other, block by block.

The work follows the rows in use, not the capacity: blocks of the cache are visited in a loop whose
number of turns is traced, and their softmax is merged on the way (online softmax, arXiv 1805.02867,
as flash attention does). Positions decide who sees whom, see `nn.kv_cache`.

Sequences of very different lengths read blocks of their own (`CachedRows.lengths`): far blocks,
which are larger, are read by those that reach them, one after another if they are few. A sequence
merges the same blocks in the same order whatever else is in the batch; only the rounding of sums
inside a block may differ.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int

from megatransformer_jax.ops.attention_xla import MASKED_LOGIT, LogitTerms
from megatransformer_jax.sharding.rules import Sharder

# Row maximum, sum of exponentials, weighted sum of values; each [B, N, T, ...] in float32.
_Partial = tuple[jax.Array, jax.Array, jax.Array]

# Far blocks double in size up to so many times the first. They cost fewer turns of a loop, and a
# sequence that ends inside one reads at most twice the rows that it has.
_LARGEST_BLOCK = 4
# At most one in so many sequences is few: then they are read one after another.
_FEW = 4


@struct.dataclass
class CachedRows:
    """One entry of a cache as attention reads it.

    Attributes:
      pairs: keys and values of all entries, as `side_by_side` leaves them.
      entry: which of them: one for all sequences, or one for each.
      positions: place of each row's token in its sequence; -1 hides the row.
      length: rows in use; later blocks are not read.
      block_rows: rows per turn; divides S. 0: all in one, without a loop, used or not; for
        runtimes whose loops are slow.
      lanes: numbers of the last axis that the device takes at once; 1: any. Halves that are no
        whole number of them are not cut apart, as that would move each number to another lane.
        Queries with zeros in place of the values multiply the pairs, at the same price.
      sharder: where the sequences and heads are.
      sequence: the one that is read, by a batch of one; `entry` is one number then. None: all.
      lengths: rows in use of each sequence, 0 for those whose output nobody reads; for one new
        token per sequence, with `block_rows`, on one device. None: `length` counts for all.
    """

    pairs: Float[Array, "E B K S P"]
    entry: Int[Array, ""] | Int[Array, "B"] | int
    positions: Int[Array, "B S"]
    length: Int[Array, ""]
    block_rows: int = struct.field(pytree_node=False)
    lanes: int = struct.field(pytree_node=False, default=1)
    sharder: Sharder = struct.field(pytree_node=False, default=Sharder())
    sequence: Int[Array, ""] | None = None
    lengths: Int[Array, "B"] | None = None


def side_by_side(
    key: Float[Array, "*rows H"], value: Float[Array, "*rows H"], width: int
) -> Float[Array, "*rows P"]:
    """Pairs of `width` numbers; what a half leaves over is 0."""
    over = ((0, 0),) * (key.ndim - 1) + ((0, width // 2 - key.shape[-1]),)
    return jnp.concatenate([jnp.pad(key, over), jnp.pad(value, over)], axis=-1)


def apart(
    pairs: Float[Array, "*rows P"], head_width: int
) -> tuple[Float[Array, "*rows H"], Float[Array, "*rows H"]]:
    """Keys and values of pairs."""
    half = pairs.shape[-1] // 2
    return pairs[..., :head_width], pairs[..., half : half + head_width]


def cached_attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B T K H"],
    value: Float[Array, "B T K H"],
    query_positions: Int[Array, "B T"],
    key_positions: Int[Array, "B T"],
    cached: CachedRows,
    *,
    window: int | None = None,
    terms: LogitTerms | None = None,
) -> Float[Array, "B T N H"]:
    """softmax(f(q k^T / sqrt(H))) v over the cached rows and the new ones.

    Args:
      query: of the new tokens, rotated already if positions are rotary.
      key: of the new tokens.
      value: of the new tokens.
      query_positions: of the new tokens; -1 for padding, whose output is zero.
      key_positions: the same, with -1 also for new tokens that must not be seen.
      cached: what came before.
      window: a query sees positions above its own - window. None: all.
      terms: soft-cap and ALiBi, whose distance is that of positions. None: neither.

    Returns:
      The mixed values, in the query's type.
    """
    terms = LogitTerms() if terms is None else terms
    scaled = query.transpose(0, 2, 1, 3) * query.shape[-1] ** -0.5
    key, value = key.transpose(0, 2, 1, 3), value.transpose(0, 2, 1, 3)
    queries = _Queries(scaled, query_positions, window, terms)
    if cached.lengths is not None:
        assert cached.block_rows and query.shape[1] == 1
        partial = _by_sequence(queries, key, value, key_positions, cached, cached.lengths)
    else:
        partial = _begin(*queries.against(key, value, key_positions))
        if cached.block_rows:
            partial = _by_blocks(queries, cached, partial)
        else:
            rows = cached.positions.shape[1]
            partial = _merge(partial, *queries.against_block(cached, 0, rows))
    peak, total, mixed = partial
    # A query that saw nothing has only masked logits, whose exponentials are 1, not 0.
    mixed = jnp.where(peak > MASKED_LOGIT / 2, mixed / total, 0.0)
    return mixed.transpose(0, 2, 1, 3).astype(query.dtype)


@struct.dataclass
class _Queries:
    """Queries [B, N, T, H], scaled, at positions [B, T], and what their logits are made of."""

    scaled: jax.Array
    positions: jax.Array
    window: int | None = struct.field(pytree_node=False)
    terms: LogitTerms

    def against(
        self, key: jax.Array, value: jax.Array, positions: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Logits [B, N, T, S] for keys [B, K, S, H] at positions [B, S], and the values.

        Both may be the same pairs [B, K, S, P].
        """
        distance = (self.positions[:, :, None] - positions[:, None, :])[:, None]
        is_visible = (distance >= 0) & (positions >= 0)[:, None, None]
        if self.window is not None:
            is_visible &= distance < self.window
        key = jnp.where((positions >= 0)[:, None, :, None], key, 0)
        logits = _logits_of(self.scaled, key)
        terms = self.terms
        if terms.softcap is not None:
            logits = terms.softcap * jnp.tanh(logits / terms.softcap)
        if terms.alibi_slopes is not None:
            logits = logits - terms.alibi_slopes[:, None, None] * distance.astype(jnp.float32)
        # Hidden rows weigh 0, which times a value that is not finite is not 0. They can be rejected
        # drafts that overflowed, or what another sequence left there.
        value = jnp.where((positions >= 0)[:, None, :, None], value, 0)
        return jnp.where(is_visible, logits, MASKED_LOGIT), value

    def against_block(
        self, cached: CachedRows, start: jax.Array | int, num_rows: int
    ) -> tuple[jax.Array, jax.Array]:
        """The same for rows of the cache, from `start` on."""
        batch_size, capacity = self.positions.shape[0], cached.positions.shape[1]
        first = 0 if cached.sequence is None else cached.sequence
        # A block that would reach over the end begins earlier; what it has seen before is hidden.
        corner = start if capacity % num_rows == 0 else jnp.minimum(start, capacity - num_rows)
        positions = jax.lax.dynamic_slice(cached.positions, (first, corner), (batch_size, num_rows))
        if capacity % num_rows:
            positions = jnp.where(corner + jnp.arange(num_rows) >= start, positions, -1)
        block, width = (corner, batch_size, num_rows), self.scaled.shape[-1]
        if cached.lanes == 1:
            # Each by itself: what is hidden is then not even loaded, as loads and masks are fused.
            key, value = (_block(cached, *block, (first, width)) for first in (0, width))
            return self.against(key, value, positions)
        pairs = _block(cached, *block)
        if pairs.shape[-1] // 2 % cached.lanes:
            return self.against(pairs, pairs, positions)
        return self.against(*apart(pairs, width), positions)


def _by_blocks(queries: _Queries, cached: CachedRows, partial: _Partial) -> _Partial:
    """All sequences read the same blocks: near ones, and far ones, which are larger."""
    first, size = _first_row(queries.positions, queries.window), cached.block_rows
    far = size * _LARGEST_BLOCK

    def absorb_from(
        begin: jax.Array | int, end: jax.Array, num_rows: int, partial: _Partial
    ) -> _Partial:
        def absorb(index: jax.Array, partial: _Partial) -> _Partial:
            return _merge(partial, *queries.against_block(cached, index * num_rows, num_rows))

        first, last = begin // num_rows, -(-end // num_rows)
        absorbed: _Partial = jax.lax.fori_loop(first, last, absorb, partial)
        return absorbed

    if cached.positions.shape[1] <= far:
        return absorb_from(first, cached.length, size, partial)
    partial = absorb_from(first, jnp.minimum(cached.length, far), size, partial)
    return absorb_from(jnp.maximum(first, far), cached.length, far, partial)


def _by_sequence(
    queries: _Queries,
    key: jax.Array,
    value: jax.Array,
    key_positions: jax.Array,
    cached: CachedRows,
    lengths: jax.Array,
) -> _Partial:
    """One new token per sequence, each of which reads its own blocks."""
    capacity, size = cached.positions.shape[1], cached.block_rows
    own = queries.against(key, value, key_positions)
    partial = _begin_two(own, queries.against_block(cached, 0, size))
    if capacity == size:
        return partial

    def further(partial: _Partial) -> _Partial:
        start, num_rows = size, size
        while start < capacity and num_rows < size * _LARGEST_BLOCK:
            partial = _absorb(queries, cached, lengths, start, num_rows, partial)
            start, num_rows = start + num_rows, min(2 * num_rows, capacity)
        if start >= capacity:
            return partial

        def absorb(index: jax.Array, partial: _Partial) -> _Partial:
            return _absorb(queries, cached, lengths, index * num_rows, num_rows, partial)

        last = -(-jnp.max(lengths) // num_rows)
        absorbed: _Partial = jax.lax.fori_loop(start // num_rows, last, absorb, partial)
        return absorbed

    merged: _Partial = jax.lax.cond(
        jnp.max(lengths) > size, further, lambda partial: partial, partial
    )
    return merged


def _absorb(
    queries: _Queries,
    cached: CachedRows,
    lengths: jax.Array,
    start: jax.Array | int,
    num_rows: int,
    partial: _Partial,
) -> _Partial:
    """Merges a block into the sequences that reach it."""
    batch_size = lengths.shape[0]
    is_read = lengths > start
    if queries.window is not None:
        is_read &= queries.positions[:, 0] - queries.window + 1 < start + num_rows
    count = jnp.sum(is_read, dtype=jnp.int32)

    def all_at_once(partial: _Partial) -> _Partial:
        return _merge(partial, *queries.against_block(cached, start, num_rows))

    def one_by_one(partial: _Partial) -> _Partial:
        order = jnp.argsort(~is_read)

        def absorb_one(turn: jax.Array, partial: _Partial) -> _Partial:
            sequence = order[turn]
            take = functools.partial(
                jax.lax.dynamic_slice_in_dim, start_index=sequence, slice_size=1
            )
            own: Any = queries
            own = own.replace(scaled=take(queries.scaled), positions=take(queries.positions))
            entries = jnp.asarray(cached.entry)
            entry = entries[sequence] if entries.ndim else entries
            view: Any = cached
            view = view.replace(entry=entry, sequence=sequence)
            seen = own.against_block(view, start, num_rows)
            merged = _merge(jax.tree.map(take, partial), *seen)
            put = functools.partial(
                jax.lax.dynamic_update_slice_in_dim, start_index=sequence, axis=0
            )
            put_all: _Partial = jax.tree.map(put, partial, merged)
            return put_all

        absorbed: _Partial = jax.lax.fori_loop(0, count, absorb_one, partial)
        return absorbed

    if batch_size < _FEW:
        return all_at_once(partial)
    merged: _Partial = jax.lax.cond(count * _FEW > batch_size, all_at_once, one_by_one, partial)
    return merged


def _block(
    cached: CachedRows,
    start: Any,
    batch_size: int,
    block_rows: int,
    part: tuple[int, int] | None = None,
) -> jax.Array:
    """Pairs [B, K, block_rows, P] of the sequences that read, or a part of each: first and size."""
    heads = cached.pairs.shape[2]
    first_number, width = (0, cached.pairs.shape[-1]) if part is None else part
    first = 0 if cached.sequence is None else cached.sequence
    if jnp.ndim(cached.entry) == 0:
        corner = (cached.entry, first, 0, start, first_number)
        shape = (1, batch_size, heads, block_rows, width)
        return jax.lax.dynamic_slice(cached.pairs, corner, shape)[0]
    if cached.lanes > 1:
        return _block_of_each(cached, start, block_rows)

    def of_sequence(rows: jax.Array, entry: jax.Array) -> jax.Array:
        shape = (1, heads, block_rows, width)
        return jax.lax.dynamic_slice(rows, (entry, 0, start, first_number), shape)[0]

    return jax.vmap(of_sequence, in_axes=(1, 0))(cached.pairs, jnp.asarray(cached.entry))


def _block_of_each(cached: CachedRows, start: Any, block_rows: int) -> jax.Array:
    """The same where each sequence reads its own entry, one slice per sequence.

    For a gather over all sequences a TPU copies the whole cache into another layout.
    """

    def take(pairs: jax.Array, entries: jax.Array, start: jax.Array) -> jax.Array:
        _, batch_size, heads, _, width = pairs.shape
        shape = (1, 1, heads, block_rows, width)
        corners = [(entries[number], number, 0, start, 0) for number in range(batch_size)]
        return jnp.concatenate([jax.lax.dynamic_slice(pairs, at, shape)[0] for at in corners])

    sharder = cached.sharder
    if sharder.mesh is not None:
        # Each device reads its own sequences.
        spec = sharder.rules.spec
        take = jax.shard_map(
            take,
            mesh=sharder.mesh,
            in_specs=(spec(None, "batch", "kv_heads", None, None), spec("batch"), spec()),
            out_specs=spec("batch", "kv_heads", None, None),
            check_vma=False,
        )
    return take(cached.pairs, jnp.asarray(cached.entry), jnp.asarray(start))


def _begin(logits: jax.Array, value: jax.Array) -> _Partial:
    """The first step of the online softmax, see `_merge`."""
    peak = jnp.max(logits, axis=-1, keepdims=True)
    weights = jnp.exp(logits - peak)
    mixed = _mix(weights, value, value.shape[-1])
    return peak, jnp.sum(weights, axis=-1, keepdims=True), mixed


def _begin_two(own: tuple[jax.Array, jax.Array], others: tuple[jax.Array, jax.Array]) -> _Partial:
    """The first step over one row and over a block, in fewer operations than one by one."""
    (logit, own_value), (logits, value) = own, others
    peak = jnp.maximum(logit, jnp.max(logits, axis=-1, keepdims=True))
    own_weight, weights = jnp.exp(logit - peak), jnp.exp(logits - peak)
    group = logit.shape[1] // own_value.shape[1]
    own_value = jnp.repeat(own_value, group, axis=1)
    mixed = _mix(weights, value, own_value.shape[-1])
    total = own_weight + jnp.sum(weights, axis=-1, keepdims=True)
    return peak, total, mixed + own_weight * own_value.astype(jnp.float32)


def _merge(partial: _Partial, logits: jax.Array, value: jax.Array) -> _Partial:
    """One step of the online softmax: logits [B, N, T, S] and values [B, K, S, H], or pairs."""
    peak, total, mixed = partial
    new_peak = jnp.maximum(peak, jnp.max(logits, axis=-1, keepdims=True))
    weights = jnp.exp(logits - new_peak)
    shrink = jnp.exp(peak - new_peak)
    return (
        new_peak,
        total * shrink + jnp.sum(weights, axis=-1, keepdims=True),
        mixed * shrink + _mix(weights, value, mixed.shape[-1]),
    )


def _mix(weights: jax.Array, value: jax.Array, width: int) -> jax.Array:
    """Weights [B, N, T, S] times values, or pairs: [B, N, T, H] of the values."""
    mixed = _grouped_product("BKRS,BKSH->BKRH", weights.astype(value.dtype), value)
    return mixed if mixed.shape[-1] == width else apart(mixed, width)[1]


def _logits_of(scaled: jax.Array, key: jax.Array) -> jax.Array:
    """[B, N, T, H] times [B, K, S, H], or pairs: [B, N, T, S]."""
    scaled = jnp.pad(scaled, ((0, 0),) * 3 + ((0, key.shape[-1] - scaled.shape[-1]),))
    if scaled.shape[2] > 1:
        return _grouped_product("BKRH,BKSH->BKRS", scaled, key)
    # Keys on the left, as they lie: XLA's products on CPU would copy and transpose them otherwise.
    batch_size, num_heads, _, width = scaled.shape
    grouped = scaled.reshape(batch_size, key.shape[1], -1, width)
    product = jnp.einsum("BKSH,BKRH->BKSR", key, grouped, preferred_element_type=jnp.float32)
    return jnp.swapaxes(product, 2, 3).reshape(batch_size, num_heads, 1, -1)


def _grouped_product(equation: str, left: jax.Array, right: jax.Array) -> jax.Array:
    """[B, N, T, X] times [B, K, ...]: the query heads of a group and their rows are one axis R."""
    batch_size, num_heads, num_rows, last = left.shape
    grouped = left.reshape(batch_size, right.shape[1], -1, last)
    product = jnp.einsum(equation, grouped, right, preferred_element_type=jnp.float32)
    return product.reshape(batch_size, num_heads, num_rows, -1)


def _first_row(query_positions: jax.Array, window: int | None) -> Any:
    """The first row that a window reaches. A token's row is never below its position."""
    if window is None:
        return 0
    far = jnp.iinfo(jnp.int32).max
    lowest = jnp.min(jnp.where(query_positions >= 0, query_positions, far))
    return jnp.maximum(lowest - window + 1, 0)
