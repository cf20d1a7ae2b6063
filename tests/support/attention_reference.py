"""Attention written as the definition reads: loops, float64, no JAX; and ours, option by option."""

import numpy as np

from megatransformer_jax.ops.attention import Kernel, attention
from megatransformer_jax.ops.attention_xla import Dropout, LogitTerms
from megatransformer_jax.sharding.rules import Sharder


def attention_reference(
    query,
    key,
    value,
    *,
    is_causal=True,
    window=None,
    offsets=None,
    query_ids=None,
    key_ids=None,
    softcap=None,
    slopes=None,
    head_mask=None,
):
    """[B, T, N, H] from query [B, T, N, H], key and value [B, S, K, H].

    `offsets` has one number per sequence.
    """
    query, key, value = (np.asarray(array, np.float64) for array in (query, key, value))
    batch_size, query_length, num_heads, width = query.shape
    key_length, kv_heads = key.shape[1:3]
    output = np.zeros(query.shape)
    for b in range(batch_size):
        offset = 0 if offsets is None else int(offsets[b])
        for t in range(query_length):
            row = offset + t
            seen = [
                s
                for s in range(min(key_length, offset + query_length))
                if (not is_causal or s <= row)
                and (window is None or row - s < window)
                and (query_ids is None or 0 != query_ids[b][t] == key_ids[b][s])
            ]
            if not seen:
                continue
            for n in range(num_heads):
                k = n // (num_heads // kv_heads)
                logits = key[b, seen, k] @ query[b, t, n] / np.sqrt(width)
                if softcap is not None:
                    logits = softcap * np.tanh(logits / softcap)
                if slopes is not None:
                    logits = logits - float(slopes[n]) * np.abs(row - np.asarray(seen))
                weights = np.exp(logits - logits.max())
                weights = weights / weights.sum()
                output[b, t, n] = weights @ value[b, seen, k]
                if head_mask is not None:
                    output[b, t, n] *= head_mask[n]
    return output


def attend(query, key, value, mask, *, platform="cpu", kernel="auto", sharder=None, **options):
    """`ops.attention.attention` with each option on its own."""
    dropout = None
    if "dropout_rate" in options:
        dropout = Dropout(options.pop("dropout_rate"), options.pop("dropout_key", None))
    terms = LogitTerms(options.pop("logit_softcap", None), options.pop("alibi_slopes", None))
    place = Kernel(platform, kernel, Sharder() if sharder is None else sharder)
    return attention(query, key, value, mask, place, terms=terms, dropout=dropout, **options)
