"""Attention in plain XLA operations: serves every option on every platform."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from megatransformer_jax.ops.masks import AttentionMask, dense_mask, row_distance

# Finite, so that a row without any visible key stays free of NaN in values and gradients.
MASKED_LOGIT = -1e30


def attention_xla(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K H"],
    mask: AttentionMask,
    *,
    logit_softcap: float | None = None,
    alibi_slopes: Float[Array, "N"] | None = None,
    dropout_rate: float = 0.0,
    dropout_key: Array | None = None,
) -> Float[Array, "B T N H"]:
    """Softmax attention; see `ops.attention.attention` for the arguments."""
    (batch_size, query_length, num_heads, width) = query.shape
    key_length, kv_heads = key.shape[1:3]
    groups = num_heads // kv_heads
    grouped = query.reshape(batch_size, query_length, kv_heads, groups, width)
    logits = jnp.einsum("BTKGH,BSKH->BKGTS", grouped, key, preferred_element_type=jnp.float32)
    logits = logits * width**-0.5
    if logit_softcap is not None:
        logits = logit_softcap * jnp.tanh(logits / logit_softcap)
    if alibi_slopes is not None:
        distance = row_distance(mask.query_offset, query_length, key_length)[:, None, None]
        slopes = alibi_slopes.astype(jnp.float32).reshape(kv_heads, groups, 1, 1)
        logits = logits - slopes * jnp.abs(distance)
    allowed = dense_mask(mask, query_length, key_length)
    if allowed is not None:
        logits = jnp.where(allowed[:, None, None], logits, MASKED_LOGIT)
    weights = jax.nn.softmax(logits, axis=-1)
    if dropout_rate > 0.0:
        keep = jax.random.bernoulli(dropout_key, 1.0 - dropout_rate, weights.shape)
        weights = jnp.where(keep, weights / (1.0 - dropout_rate), 0.0)
    output = jnp.einsum("BKGTS,BSKH->BTKGH", weights.astype(value.dtype), value)
    if allowed is not None:
        sees_any = jnp.any(allowed, axis=-1)[:, :, None, None, None]
        output = jnp.where(sees_any, output, 0)
    return output.reshape(query.shape)
