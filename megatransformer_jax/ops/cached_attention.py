"""Attention of new tokens to a cache and to each other, block by block.

The work follows the rows in use, not the capacity: blocks of the cache are visited in a loop whose
number of turns is traced, and their softmax is merged on the way (online softmax, arXiv 1805.02867,
as flash attention does). Positions decide who sees whom, see `nn.kv_cache`.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int

from megatransformer_jax.ops.attention_xla import MASKED_LOGIT, LogitTerms

# Row maximum, sum of exponentials, weighted sum of values; each [B, N, T, ...] in float32.
_Partial = tuple[jax.Array, jax.Array, jax.Array]


@struct.dataclass
class CachedRows:
    """One entry of a cache as attention reads it.

    Attributes:
      key: all entries.
      value: all entries.
      entry: which of them: one for all sequences, or one for each.
      positions: place of each row's token in its sequence; -1 hides the row.
      length: rows in use; later blocks are not read.
      block_rows: rows per turn; divides S. 0: all in one, without a loop, used or not; for
        runtimes whose loops are slow.
      sequence: the one that is read, by a batch of one; `entry` is one number then. None: all.
    """

    key: Float[Array, "E B K S H"]
    value: Float[Array, "E B K S H"]
    entry: Int[Array, ""] | Int[Array, "B"] | int
    positions: Int[Array, "B S"]
    length: Int[Array, ""]
    block_rows: int = struct.field(pytree_node=False)
    sequence: Int[Array, ""] | None = None


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
    batch_size, num_rows, num_heads, width = query.shape
    scaled = query.transpose(0, 2, 1, 3) * width**-0.5

    def absorb(
        partial: _Partial, key: jax.Array, value: jax.Array, positions: jax.Array
    ) -> _Partial:
        """Merges keys and values [B, K, S, H] at positions [B, S]."""
        distance = (query_positions[:, :, None] - positions[:, None, :])[:, None]
        is_visible = (distance >= 0) & (positions >= 0)[:, None, None]
        if window is not None:
            is_visible &= distance < window
        logits = _grouped_product("BKRH,BKSH->BKRS", scaled, key)
        if terms.softcap is not None:
            logits = terms.softcap * jnp.tanh(logits / terms.softcap)
        if terms.alibi_slopes is not None:
            logits = logits - terms.alibi_slopes[:, None, None] * distance.astype(jnp.float32)
        # Hidden rows weigh 0, which times a value that is not finite is not 0. They can be rejected
        # drafts that overflowed, or what another sequence left there.
        value = jnp.where((positions >= 0)[:, None, :, None], value, 0)
        return _merge(partial, jnp.where(is_visible, logits, MASKED_LOGIT), value)

    block_rows = cached.block_rows or cached.positions.shape[1]

    def absorb_block(index: jax.Array | int, partial: _Partial) -> _Partial:
        start = index * block_rows
        first = 0 if cached.sequence is None else cached.sequence
        positions_shape = (batch_size, block_rows)
        return absorb(
            partial,
            _block(cached.key, cached, start, batch_size, block_rows),
            _block(cached.value, cached, start, batch_size, block_rows),
            jax.lax.dynamic_slice(cached.positions, (first, start), positions_shape),
        )

    shape = (batch_size, num_heads, num_rows)
    nothing = (
        jnp.full((*shape, 1), MASKED_LOGIT, jnp.float32),
        jnp.zeros((*shape, 1), jnp.float32),
        jnp.zeros((*shape, width), jnp.float32),
    )
    key, value = key.transpose(0, 2, 1, 3), value.transpose(0, 2, 1, 3)
    partial = absorb(nothing, key, value, key_positions)
    if cached.block_rows:
        first = _first_block(query_positions, window, block_rows)
        last = -(-cached.length // block_rows)
        partial = jax.lax.fori_loop(first, last, absorb_block, partial)
    else:
        partial = absorb_block(0, partial)
    peak, total, mixed = partial
    # A query that saw nothing has only masked logits, whose exponentials are 1, not 0.
    mixed = jnp.where(peak > MASKED_LOGIT / 2, mixed / total, 0.0)
    return mixed.transpose(0, 2, 1, 3).astype(query.dtype)


def _block(
    array: jax.Array, cached: CachedRows, start: Any, batch_size: int, block_rows: int
) -> jax.Array:
    """Keys or values [B, K, block_rows, H] of the sequences that read."""
    _, _, heads, _, width = array.shape
    first = 0 if cached.sequence is None else cached.sequence
    if jnp.ndim(cached.entry) == 0:
        corner = (cached.entry, first, 0, start, 0)
        shape = (1, batch_size, heads, block_rows, width)
        return jax.lax.dynamic_slice(array, corner, shape)[0]

    def of_sequence(rows: jax.Array, entry: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice(rows, (entry, 0, start, 0), (1, heads, block_rows, width))[0]

    return jax.vmap(of_sequence, in_axes=(1, 0))(array, jnp.asarray(cached.entry))


def _merge(partial: _Partial, logits: jax.Array, value: jax.Array) -> _Partial:
    """One step of the online softmax: logits [B, N, T, S] and values [B, K, S, H]."""
    peak, total, mixed = partial
    new_peak = jnp.maximum(peak, jnp.max(logits, axis=-1, keepdims=True))
    weights = jnp.exp(logits - new_peak)
    shrink = jnp.exp(peak - new_peak)
    added = _grouped_product("BKRS,BKSH->BKRH", weights.astype(value.dtype), value)
    return (
        new_peak,
        total * shrink + jnp.sum(weights, axis=-1, keepdims=True),
        mixed * shrink + added,
    )


def _grouped_product(equation: str, left: jax.Array, right: jax.Array) -> jax.Array:
    """[B, N, T, X] times [B, K, ...]: the query heads of a group and their rows are one axis R."""
    batch_size, num_heads, num_rows, last = left.shape
    grouped = left.reshape(batch_size, right.shape[1], -1, last)
    product = jnp.einsum(equation, grouped, right, preferred_element_type=jnp.float32)
    return product.reshape(batch_size, num_heads, num_rows, -1)


def _first_block(query_positions: jax.Array, window: int | None, block_rows: int) -> Any:
    """The first block that a window reaches. A token's row is never below its position."""
    if window is None:
        return 0
    far = jnp.iinfo(jnp.int32).max
    lowest = jnp.min(jnp.where(query_positions >= 0, query_positions, far))
    return jnp.maximum(lowest - window + 1, 0) // block_rows
