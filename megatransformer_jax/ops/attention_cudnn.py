"""Attention by cuDNN's fused kernel (flash attention) on NVIDIA GPUs."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from megatransformer_jax.ops.masks import AttentionMask, dense_mask, zero_blind_rows


def attention_cudnn(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K H"],
    mask: AttentionMask,
    *,
    needs_dense_mask: bool,
) -> Float[Array, "B T N H"]:
    """Softmax attention, no options; see `ops.attention.attention` for the arguments.

    `needs_dense_mask` is that of the call's `AttentionFeatures`. Without it cuDNN skips masked
    tiles by itself; with it the mask is read as an additive bias [B or 1, 1, T, S].
    """
    window, dense = None, None
    if needs_dense_mask:
        dense = dense_mask(mask, query.shape[1], key.shape[1])
        dense = None if dense is None else dense[:, None]
    elif mask.window is not None:
        window = (mask.window - 1, 0)
    output = jax.nn.dot_product_attention(
        query,
        key,
        value,
        mask=dense,
        is_causal=mask.is_causal and not needs_dense_mask,
        local_window_size=window,
        implementation="cudnn",
    )
    return zero_blind_rows(jnp.asarray(output), mask, key.shape[1])
