"""Attention in plain XLA operations: serves every option on every platform.

What makes it fast where there is no fused kernel: heads come before rows, so both products are
batched matrix products; the softmax keeps only its result for the backward pass; the mask is an
additive bias without a head axis; and a causal query block is never multiplied with keys that lie
wholly in its future (5/8 of the work with 4 blocks).
"""

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float

from megatransformer_jax.ops.attention_exchange import gather_rows
from megatransformer_jax.ops.masks import AttentionMask, dense_mask, row_distance
from megatransformer_jax.sharding.rules import Sharder

# Finite, so that a row without any visible key stays free of NaN. It absorbs any usual logit:
# -1e30 + logit == -1e30 in float32, so adding it is the same as selecting it.
MASKED_LOGIT = -1e30
# More blocks skip more but make the matrix products small and the program long.
MAX_QUERY_BLOCKS = 4
MIN_BLOCK_ROWS = 64


@struct.dataclass
class LogitTerms:
    """What is done to logits beyond scaling, in this order.

    Attributes:
      softcap: bounds logits smoothly, cap * tanh(logit / cap) (Gemma 2, arXiv 2408.00118).
      alibi_slopes: [N] from `ops.positions.alibi_slopes`; logit -= slope * |rows apart|.
    """

    softcap: float | None = struct.field(pytree_node=False, default=None)
    alibi_slopes: Float[Array, "N"] | None = None


@struct.dataclass
class Dropout:
    """Zeroes attention weights; the others grow to keep the mean.

    Attributes:
      rate: probability of zeroing.
      key: PRNG key, needed if the rate is above 0.
    """

    rate: float = struct.field(pytree_node=False)
    key: Array | None


def attention_xla(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K H"],
    mask: AttentionMask,
    *,
    terms: LogitTerms | None = None,
    dropout: Dropout | None = None,
    rows_are_whole: bool = True,
) -> Float[Array, "B T N H"]:
    """Softmax attention; see `ops.attention.attention` for the arguments.

    Set `rows_are_whole` to False where the query rows are cut over devices: slicing that axis into
    blocks, or merging it with another, would move data.
    """
    terms = LogitTerms() if terms is None else terms
    query_length, key_length, width = query.shape[1], key.shape[1], query.shape[-1]
    scale = width**-0.5
    if query.dtype == jnp.float32:  # Cheaper here than on logits, and as exact.
        query, scale = query * scale, 1.0
    query, key, value = (array.transpose(0, 2, 1, 3) for array in (query, key, value))
    bias = _mask_bias(mask, query_length, key_length)
    has_alibi = terms.alibi_slopes is not None
    distance = None if not has_alibi else _distance(mask, query_length, key_length)

    outputs = []
    for index, (rows, keys) in enumerate(
        query_blocks(mask, query_length, key_length, rows_are_whole)
    ):
        logits = _logits(query[:, :, rows], key[:, :, keys], rows_are_whole)
        if scale != 1.0:
            logits = logits * scale
        if terms.softcap is not None:
            logits = terms.softcap * jnp.tanh(logits / terms.softcap)
        if terms.alibi_slopes is not None and distance is not None:
            logits = logits - terms.alibi_slopes[:, None, None] * distance[..., rows, keys]
        if bias is not None:
            logits = logits + bias[..., rows, keys]
        weights = masked_softmax(logits)
        if dropout is not None and dropout.rate > 0.0:
            assert dropout.key is not None  # attention() checks it
            weights = _dropout(weights, dropout.rate, jax.random.fold_in(dropout.key, index))
        outputs.append(_mix(weights, value[:, :, keys], rows_are_whole))
    output = outputs[0] if len(outputs) == 1 else jnp.concatenate(outputs, axis=2)
    return output.transpose(0, 2, 1, 3)


# ------------------------------------------------------------------------------
# Rows that are cut over devices, where each gathers the keys and values of all.


def parts_are_alike(query: Array, key: Array, mask: AttentionMask, sharder: Sharder) -> bool:
    """Whether `attention_xla_cut_rows` serves: every device has as many rows, sequences and heads,
    and its rows see no later ones."""
    shape = {"batch": query.shape[0], "length": query.shape[1], "kv_heads": key.shape[2]}
    divides = all(extent % sharder.ways(axis) == 0 for axis, extent in shape.items())
    is_square = isinstance(mask.query_offset, int) and query.shape[1] == key.shape[1]
    return divides and is_square and mask.is_causal


def attention_xla_cut_rows(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B T K H"],
    value: Float[Array, "B T K H"],
    mask: AttentionMask,
    *,
    terms: LogitTerms,
    sharder: Sharder,
) -> Float[Array, "B T N H"]:
    """`attention_xla` where the mesh cuts rows, and `parts_are_alike`.

    Each device attends from its own rows. Left to the compiler, the gradients of keys and values
    would be summed over devices in float32, in which the products make them. Here devices send
    the arrays' own type.
    """
    axes = sharder.rules.length

    def local(
        query: Array,
        key: Array,
        value: Array,
        query_ids: Array | None,
        key_ids: Array | None,
        slopes: Array | None,
    ) -> Array:
        key, value = gather_rows(key, axes), gather_rows(value, axes)
        offset = jax.lax.axis_index(axes) * query.shape[1]
        own = AttentionMask(True, mask.window, offset, query_ids, key_ids)
        return attention_xla(query, key, value, own, terms=LogitTerms(terms.softcap, slopes))

    rules = sharder.rules
    heads = rules.spec("batch", "length", "heads", None)
    kv_heads = rules.spec("batch", "length", "kv_heads", None)
    ids, all_ids = rules.spec("batch", "length"), rules.spec("batch", None)
    attended: Array = jax.shard_map(
        local,
        mesh=sharder.mesh,
        in_specs=(heads, kv_heads, kv_heads, ids, all_ids, rules.spec("heads")),
        out_specs=heads,
        check_vma=False,
    )(query, key, value, mask.query_segment_ids, mask.key_segment_ids, terms.alibi_slopes)
    return attended


def query_blocks(
    mask: AttentionMask, query_length: int, key_length: int, rows_are_whole: bool
) -> list[tuple[slice, slice]]:
    """Query rows, and the keys that they may see, block by block.

    Keys are cut only if the offset is static. Several blocks only if causality makes them see
    different keys.
    """
    offset = mask.query_offset
    if not isinstance(offset, int):
        return [(slice(0, query_length), slice(0, key_length))]
    block = query_length
    if mask.is_causal and rows_are_whole:
        block = max(MIN_BLOCK_ROWS, -(-query_length // MAX_QUERY_BLOCKS))
    blocks = []
    for start in range(0, query_length, block):
        stop = min(start + block, query_length)
        first = 0 if mask.window is None else max(0, offset + start - mask.window + 1)
        last = offset + (stop if mask.is_causal else query_length)
        blocks.append((slice(start, stop), slice(first, last)))
    return blocks


@jax.custom_jvp
def masked_softmax(logits: Float[Array, "*batch S"]) -> Float[Array, "*batch S"]:
    """Softmax over the last axis in float32; exact zeros where all logits are masked.

    Its derivative needs only its result, so nothing else is kept for the backward pass.
    """
    peak = jnp.max(logits, axis=-1, keepdims=True)
    exponential = jnp.exp(logits - peak)
    total = jnp.sum(exponential, axis=-1, keepdims=True)
    return exponential * jnp.where(peak > MASKED_LOGIT / 2, 1.0 / total, 0.0)


@masked_softmax.defjvp
def _masked_softmax_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    weights = masked_softmax(*primals)
    product = weights * tangents[0]
    return weights, product - weights * jnp.sum(product, axis=-1, keepdims=True)


def _logits(query: jax.Array, key: jax.Array, rows_are_whole: bool) -> jax.Array:
    """[B, N, T, H] and [B, K, S, H] to float32 [B, N, T, S]."""
    grouped = _group(query, key.shape[1], rows_are_whole)
    equation = "BKRH,BKSH->BKRS" if grouped.ndim == 4 else "BKGTH,BKSH->BKGTS"
    logits = jnp.einsum(equation, grouped, key, preferred_element_type=jnp.float32)
    return logits.reshape(*query.shape[:3], key.shape[2])


def _mix(weights: jax.Array, value: jax.Array, rows_are_whole: bool) -> jax.Array:
    """[B, N, T, S] and [B, K, S, H] to [B, N, T, H], in the value's type."""
    grouped = _group(weights.astype(value.dtype), value.shape[1], rows_are_whole)
    equation = "BKRS,BKSH->BKRH" if grouped.ndim == 4 else "BKGTS,BKSH->BKGTH"
    return jnp.einsum(equation, grouped, value).reshape(*weights.shape[:3], value.shape[3])


def _group(array: jax.Array, kv_heads: int, rows_are_whole: bool) -> jax.Array:
    """[B, N, T, X] to [B, K, G*T, X], so that keys and values serve a group without copies.

    One row axis makes the products much faster on CPU than two. Cut rows do not merge with G, so
    they become [B, K, G, T, X].
    """
    batch_size, num_heads, query_length, last = array.shape
    groups = num_heads // kv_heads
    if rows_are_whole or groups == 1:
        return array.reshape(batch_size, kv_heads, groups * query_length, last)
    return array.reshape(batch_size, kv_heads, groups, query_length, last)


def _mask_bias(mask: AttentionMask, query_length: int, key_length: int) -> jax.Array | None:
    """0 where attention is allowed and MASKED_LOGIT elsewhere, [B or 1, 1, T, S]."""
    allowed = dense_mask(mask, query_length, key_length)
    if allowed is None:
        return None
    return jnp.where(allowed, 0.0, MASKED_LOGIT)[:, None]


def _distance(mask: AttentionMask, query_length: int, key_length: int) -> jax.Array:
    """Rows between query and key, float32 [B or 1, 1, T, S]."""
    distance = jnp.abs(row_distance(mask.query_offset, query_length, key_length))
    return distance.astype(jnp.float32)[:, None]


def _dropout(weights: jax.Array, rate: float, key: jax.Array) -> jax.Array:
    """Zeroes weights with probability `rate` and scales the rest to keep the mean."""
    keep = jax.random.bernoulli(key, 1.0 - rate, weights.shape)
    return jnp.where(keep, weights / (1.0 - rate), 0.0)
