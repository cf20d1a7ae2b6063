"""Softmax attention behind one function, which chooses the kernel.

| kernel | platform | serves                                                                       |
|--------|----------|------------------------------------------------------------------------------|
| xla    | any      | everything                                                                   |
| cudnn  | gpu      | bfloat16/float16, H <= 128 and a multiple of 8; T and S even where the mask  |
|        |          | must be dense (segments, cache); no soft-cap, ALiBi, dropout, cut rows       |
| splash | tpu      | bfloat16/float32, H <= 256; T, S and a static query_offset that are          |
|        |          | multiples of 128, cut rows too on each device; no ALiBi, dropout             |

`auto` takes the platform's fused kernel if it serves the call, else xla. Rows are cut where mesh
axis `sequence` is above 1 and devices cannot exchange heads for rows: `ops.attention_exchange`.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from megatransformer_jax.config.option import UserError
from megatransformer_jax.ops.attention_exchange import (
    choose_exchange,
    heads_to_rows,
    rows_to_heads,
    with_whole_rows,
)
from megatransformer_jax.ops.attention_xla import (
    Dropout,
    LogitTerms,
    attention_xla,
    attention_xla_cut_rows,
    parts_are_alike,
)
from megatransformer_jax.ops.masks import AttentionMask, check_mask, dense_mask, zero_blind_rows
from megatransformer_jax.sharding.rules import Sharder

# ------------------------------------------------------------------------------
# The one function.


@dataclasses.dataclass(frozen=True)
class Kernel:
    """Which kernel computes attention, and where.

    Attributes:
      platform: of the devices that will run this: 'cpu', 'gpu' or 'tpu'.
      name: 'auto', 'xla', 'cudnn' or 'splash', see above.
      sharder: says whether rows are cut over devices, and places Pallas kernels on the mesh. By
        default a single device.
    """

    platform: str
    name: str = "auto"
    sharder: Sharder = dataclasses.field(default_factory=Sharder)


def attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K H"],
    mask: AttentionMask,
    kernel: Kernel,
    *,
    terms: LogitTerms | None = None,
    head_mask: Float[Array, "N"] | None = None,
    dropout: Dropout | None = None,
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
      kernel: which one, and where.
      terms: soft-cap and ALiBi. None: neither.
      head_mask: [N] factor on each head's output.
      dropout: of attention weights. None: no dropout.

    Raises:
      ValueError: shapes, mask or options do not fit together.
      UnsupportedKernelError: a kernel asked for by name cannot serve the call.
    """
    terms = LogitTerms() if terms is None else terms
    _check_options(query, key, terms, dropout)
    check_mask(mask, query.shape[0], query.shape[1], key.shape[1])
    sharder = kernel.sharder
    exchange = choose_exchange(sharder, query.shape[1], key.shape[1], key.shape[2])
    inner = with_whole_rows(sharder) if exchange == "heads" else sharder
    features = _features(query, key, mask, terms, dropout, inner.ways("length"))
    chosen = choose_kernel(kernel.name, kernel.platform, features)
    if exchange != "none":
        # What splash does with ids outside of its kernel is work per row, so it stays cut.
        mask = _lay_out_ids(mask, sharder if chosen == "splash" else inner)
    if exchange == "heads":
        query, key, value = (rows_to_heads(array, sharder) for array in (query, key, value))
    if chosen == "cudnn":
        dense = features.needs_dense_mask
        output = attention_cudnn(query, key, value, mask, needs_dense_mask=dense)
    elif chosen == "splash":
        # Imported here because Pallas loads slowly and only TPUs use it.
        from megatransformer_jax.ops.attention_splash import attention_splash  # noqa: PLC0415

        output = attention_splash(
            query, key, value, mask, logit_softcap=terms.softcap, sharder=inner
        )
    else:
        output = _attend_by_xla(query, key, value, mask, terms, dropout, inner)
    if exchange == "heads":
        output = heads_to_rows(output, sharder)
    return output if head_mask is None else output * head_mask.astype(output.dtype)[:, None]


def _attend_by_xla(
    query: Array,
    key: Array,
    value: Array,
    mask: AttentionMask,
    terms: LogitTerms,
    dropout: Dropout | None,
    sharder: Sharder,
) -> Array:
    are_whole = sharder.ways("length") == 1
    has_dropout = dropout is not None and dropout.rate > 0.0
    # The draws of dropout must not depend on the mesh, and those of a device's own part would.
    if not (are_whole or has_dropout) and parts_are_alike(query, key, mask, sharder):
        return attention_xla_cut_rows(query, key, value, mask, terms=terms, sharder=sharder)
    whole = ("batch", None, "kv_heads", None)
    key, value = sharder.constrain(key, *whole), sharder.constrain(value, *whole)
    return attention_xla(
        query, key, value, mask, terms=terms, dropout=dropout, rows_are_whole=are_whole
    )


def _features(
    query: Array,
    key: Array,
    mask: AttentionMask,
    terms: LogitTerms,
    dropout: Dropout | None,
    row_shards: int,
) -> "AttentionFeatures":
    return AttentionFeatures(
        dtype=query.dtype.name,
        head_width=query.shape[-1],
        query_length=query.shape[1],
        key_length=key.shape[1],
        is_causal=mask.is_causal,
        window=mask.window,
        static_offset=mask.query_offset if isinstance(mask.query_offset, int) else None,
        has_segments=mask.query_segment_ids is not None,
        has_softcap=terms.softcap is not None,
        has_alibi=terms.alibi_slopes is not None,
        has_dropout=dropout is not None and dropout.rate > 0.0,
        row_shards=row_shards,
    )


def _lay_out_ids(mask: AttentionMask, sharder: Sharder) -> AttentionMask:
    """Segment ids of all keys on every device. Without this the compiler may move a dense mask."""
    if mask.query_segment_ids is None:
        return mask
    return dataclasses.replace(
        mask,
        query_segment_ids=sharder.constrain(mask.query_segment_ids, "batch", "length"),
        key_segment_ids=sharder.constrain(mask.key_segment_ids, "batch", None),
    )


def _check_options(query: Array, key: Array, terms: LogitTerms, dropout: Dropout | None) -> None:
    if query.shape[2] % key.shape[2]:
        raise ValueError(
            f"{query.shape[2]} query heads cannot share {key.shape[2]} KV heads; the number of "
            "query heads must be a multiple of the number of KV heads."
        )
    if terms.softcap is not None and terms.softcap <= 0:
        raise ValueError(f"logit_softcap is {terms.softcap}; it must be above 0, or None for off.")
    if dropout is None:
        return
    if not 0.0 <= dropout.rate < 1.0:
        raise ValueError(f"the dropout's rate is {dropout.rate}; it must be from 0 to below 1.")
    if dropout.rate > 0.0 and dropout.key is None:
        raise ValueError(f"the dropout's rate is {dropout.rate}, but its key is None; give a key.")


# ------------------------------------------------------------------------------
# Attention by cuDNN's fused kernel (flash attention) on NVIDIA GPUs.


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


# ------------------------------------------------------------------------------
# Which kernel serves a call: a pure function of platform and features.

KERNELS = ("auto", "xla", "cudnn", "splash")
PLATFORM_KERNELS = {"cpu": "xla", "gpu": "cudnn", "tpu": "splash"}
CUDNN_MAX_HEAD_WIDTH = 128
SPLASH_BLOCK = 128
# Wider heads do not fit the fast memory of a TPU with the tiles of `attention_splash`.
SPLASH_MAX_HEAD_WIDTH = 256


@dataclasses.dataclass(frozen=True)
class AttentionFeatures:
    """What a call to `attention` asks of a kernel."""

    dtype: str
    head_width: int
    query_length: int
    key_length: int
    is_causal: bool = True
    window: int | None = None
    static_offset: int | None = 0  # None: the offset is an array
    has_segments: bool = False
    has_softcap: bool = False
    has_alibi: bool = False
    has_dropout: bool = False
    row_shards: int = 1  # devices that the query rows are cut over, once heads are exchanged

    @property
    def needs_dense_mask(self) -> bool:
        """Whether cuDNN's own causal and window masks do not suffice."""
        square = self.static_offset == 0 and self.query_length == self.key_length
        own_window = self.window is None or self.is_causal
        return self.has_segments or not square or not own_window


class UnsupportedKernelError(UserError):
    """A kernel asked for by name cannot serve the call."""


def choose_kernel(requested: str, platform: str, features: AttentionFeatures) -> str:
    """The kernel to run: 'xla', 'cudnn' or 'splash'.

    Args:
      requested: 'auto', or a kernel by name.
      platform: of the devices that will run it: 'cpu', 'gpu' or 'tpu'.
      features: what the call needs.

    Raises:
      ValueError: unknown kernel or platform.
      UnsupportedKernelError: the named kernel cannot serve the call; the message lists why.
    """
    if requested not in KERNELS:
        raise ValueError(f"attention kernel is {requested!r}; choose one of {KERNELS}.")
    if platform not in PLATFORM_KERNELS:
        raise ValueError(f"platform is {platform!r}; known: {tuple(PLATFORM_KERNELS)}.")
    if requested == "auto":
        best = PLATFORM_KERNELS[platform]
        return "xla" if kernel_obstacles(best, features) else best
    if requested == "xla":
        return requested
    obstacles = kernel_obstacles(requested, features)
    if PLATFORM_KERNELS[platform] != requested:
        obstacles.insert(0, f"it does not run on {platform!r}")
    if obstacles:
        raise UnsupportedKernelError(
            f"model.attention.kernel={requested!r} cannot serve this run: {'; '.join(obstacles)}. "
            "Change these options, or set model.attention.kernel to 'auto' or 'xla'."
        )
    return requested


def kernel_obstacles(kernel: str, features: AttentionFeatures) -> list[str]:
    """Why `kernel` cannot serve the call, whatever the platform; empty if it can."""
    if kernel == "xla":
        return []
    obstacles = _cudnn_obstacles(features) if kernel == "cudnn" else _splash_obstacles(features)
    if features.has_alibi:
        obstacles.append("it has no ALiBi, but alibi_slopes is given")
    if features.has_dropout:
        obstacles.append("it has no dropout, but dropout_rate is above 0")
    return obstacles


def _cudnn_obstacles(features: AttentionFeatures) -> list[str]:
    obstacles = []
    if features.dtype not in ("bfloat16", "float16"):
        obstacles.append(f"it needs bfloat16 or float16, not {features.dtype}")
    if features.head_width % 8 or features.head_width > CUDNN_MAX_HEAD_WIDTH:
        obstacles.append(
            f"it needs a head width that is a multiple of 8 up to {CUDNN_MAX_HEAD_WIDTH}, "
            f"not {features.head_width}"
        )
    if features.has_softcap:
        obstacles.append("it has no soft-capping, but logit_softcap is set")
    if features.needs_dense_mask and (features.query_length % 2 or features.key_length % 2):
        obstacles.append(
            "with segments, a cache or an acausal window it needs even lengths, not "
            f"T={features.query_length}, S={features.key_length}"
        )
    if features.row_shards > 1:
        obstacles.append(
            f"it needs whole rows, but they are cut over {features.row_shards} devices (mesh axis "
            "'sequence'), among which the KV heads cannot be divided"
        )
    return obstacles


def _splash_obstacles(features: AttentionFeatures) -> list[str]:
    obstacles = []
    if features.dtype not in ("bfloat16", "float32"):
        obstacles.append(f"it needs bfloat16 or float32, not {features.dtype}")
    if features.head_width > SPLASH_MAX_HEAD_WIDTH:
        obstacles.append(
            f"it needs a head width of at most {SPLASH_MAX_HEAD_WIDTH}, not {features.head_width}"
        )
    if features.static_offset is None:
        obstacles.append("it needs query_offset as a Python int, not an array")
    shards = features.row_shards
    sizes = {
        "T": (features.query_length, SPLASH_BLOCK * shards),
        "S": (features.key_length, SPLASH_BLOCK),
        "query_offset": (features.static_offset or 0, SPLASH_BLOCK),
    }
    odd = [f"{name}={size}" for name, (size, block) in sizes.items() if size % block]
    if odd:
        where = f" on each of {shards} devices" if shards > 1 else ""
        obstacles.append(f"it needs multiples of {SPLASH_BLOCK}{where}, not {', '.join(odd)}")
    if shards > 1 and (features.static_offset or features.key_length != features.query_length):
        obstacles.append(
            f"with rows cut over {shards} devices (mesh axis 'sequence') it needs the keys of "
            f"these rows alone, not T={features.query_length}, S={features.key_length}, "
            f"query_offset={features.static_offset}"
        )
    return obstacles
