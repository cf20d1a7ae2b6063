"""Softmax attention behind one function, which chooses the kernel."""

from jaxtyping import Array, Float

from megatransformer_jax.ops.attention_xla import attention_xla
from megatransformer_jax.ops.masks import AttentionMask, check_mask


def attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K H"],
    mask: AttentionMask,
    *,
    platform: str,
    kernel: str = "auto",
    logit_softcap: float | None = None,
    alibi_slopes: Float[Array, "N"] | None = None,
    head_mask: Float[Array, "N"] | None = None,
    dropout_rate: float = 0.0,
    dropout_key: Array | None = None,
) -> Float[Array, "B T N H"]:
    """softmax(q k^T / sqrt(H)) v, multi-head or grouped-query; query head n uses KV head n // G."""
    check_mask(mask, query.shape[0], query.shape[1], key.shape[1])
    if dropout_rate > 0.0 and dropout_key is None:
        raise ValueError(f"dropout_rate is {dropout_rate}, but dropout_key is None; give a key.")
    if kernel not in ("auto", "xla"):
        raise NotImplementedError(f"kernel {kernel!r} is being written.")
    output = attention_xla(
        query,
        key,
        value,
        mask,
        logit_softcap=logit_softcap,
        alibi_slopes=alibi_slopes,
        dropout_rate=dropout_rate,
        dropout_key=dropout_key,
    )
    if head_mask is not None:
        output = output * head_mask.astype(output.dtype)[:, None]
    return output
