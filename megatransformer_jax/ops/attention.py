"""Softmax attention behind one function, which chooses the kernel."""

import math

from jaxtyping import Array, Float

from megatransformer_jax.ops.attention_cudnn import attention_cudnn
from megatransformer_jax.ops.attention_xla import attention_xla
from megatransformer_jax.ops.kernel_choice import AttentionFeatures, choose_kernel
from megatransformer_jax.ops.masks import AttentionMask, check_mask
from megatransformer_jax.sharding.rules import Sharder


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
    sharder: Sharder | None = None,
) -> Float[Array, "B T N H"]:
    """softmax(f(q k^T / sqrt(H))) v, multi-head (K = N) or grouped-query (arXiv 2305.13245).

    Query head n uses KV head n // G. The softmax is computed in float32. Order of operations on a
    logit: scale, soft-cap, ALiBi, mask, softmax, dropout. A query that may attend to nothing gives
    exact zeros and no gradient. All kernels agree up to rounding.

    Args:
      query: rotated already if positions are rotary.
      key: of all S rows, a cache's unused capacity included.
      value: as key.
      mask: who may attend to whom, see `ops.masks`.
      platform: of the devices that will run this: 'cpu', 'gpu' or 'tpu'.
      kernel: 'auto', 'xla', 'cudnn' or 'splash', see `ops.kernel_choice`.
      logit_softcap: bounds logits smoothly, cap * tanh(logit / cap) (Gemma 2, arXiv 2408.00118).
      alibi_slopes: [N] from `ops.positions.alibi_slopes`; logit -= slope * |rows apart|.
      head_mask: [N] factor on each head's output.
      dropout_rate: probability of zeroing an attention weight; the others grow to keep the mean.
      dropout_key: PRNG key, needed if dropout_rate > 0.
      sharder: says whether rows are cut over devices, and places Pallas kernels on the mesh.
        None: a single device.

    Raises:
      ValueError: shapes, mask or options do not fit together.
      UnsupportedKernelError: a kernel asked for by name cannot serve the call.
    """
    sharder = Sharder() if sharder is None else sharder
    _check_options(query, key, logit_softcap, dropout_rate, dropout_key)
    check_mask(mask, query.shape[0], query.shape[1], key.shape[1])
    features = AttentionFeatures(
        dtype=query.dtype.name,
        head_width=query.shape[-1],
        query_length=query.shape[1],
        key_length=key.shape[1],
        is_causal=mask.is_causal,
        window=mask.window,
        static_offset=mask.query_offset if isinstance(mask.query_offset, int) else None,
        has_segments=mask.query_segment_ids is not None,
        has_softcap=logit_softcap is not None,
        has_alibi=alibi_slopes is not None,
        has_dropout=dropout_rate > 0.0,
        row_shards=_row_shards(sharder),
    )
    chosen = choose_kernel(kernel, platform, features)
    if chosen == "cudnn":
        dense = features.needs_dense_mask
        output = attention_cudnn(query, key, value, mask, needs_dense_mask=dense)
    elif chosen == "splash":
        # Imported here because Pallas loads slowly and only TPUs use it.
        from megatransformer_jax.ops.attention_splash import attention_splash  # noqa: PLC0415

        output = attention_splash(
            query, key, value, mask, logit_softcap=logit_softcap, sharder=sharder
        )
    else:
        output = attention_xla(
            query,
            key,
            value,
            mask,
            logit_softcap=logit_softcap,
            alibi_slopes=alibi_slopes,
            dropout_rate=dropout_rate,
            dropout_key=dropout_key,
            rows_are_whole=features.row_shards == 1,
        )
    return output if head_mask is None else output * head_mask.astype(output.dtype)[:, None]


def _row_shards(sharder: Sharder) -> int:
    """Devices that the query rows are cut over."""
    axis = sharder.rules.length
    if sharder.mesh is None or axis is None:
        return 1
    axes = (axis,) if isinstance(axis, str) else axis
    return math.prod(sharder.mesh.shape[name] for name in axes)


def _check_options(
    query: Array,
    key: Array,
    logit_softcap: float | None,
    dropout_rate: float,
    dropout_key: Array | None,
) -> None:
    if query.shape[2] % key.shape[2]:
        raise ValueError(
            f"{query.shape[2]} query heads cannot share {key.shape[2]} KV heads; the number of "
            "query heads must be a multiple of the number of KV heads."
        )
    if logit_softcap is not None and logit_softcap <= 0:
        raise ValueError(f"logit_softcap is {logit_softcap}; it must be above 0, or None for off.")
    if not 0.0 <= dropout_rate < 1.0:
        raise ValueError(f"dropout_rate is {dropout_rate}; it must be at least 0 and below 1.")
    if dropout_rate > 0.0 and dropout_key is None:
        raise ValueError(f"dropout_rate is {dropout_rate}, but dropout_key is None; give a key.")
