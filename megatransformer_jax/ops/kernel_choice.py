"""Which attention kernel serves a call: a pure function of platform and features.

| kernel | platform | serves                                                                       |
|--------|----------|------------------------------------------------------------------------------|
| xla    | any      | everything                                                                   |
| cudnn  | gpu      | bfloat16/float16, H <= 128 and a multiple of 8; T and S even where the mask  |
|        |          | must be dense (segments, cache); no soft-cap, ALiBi, dropout, cut rows       |
| splash | tpu      | bfloat16/float32, H a multiple of 64; T, S and a static query_offset that    |
|        |          | are multiples of 128; no ALiBi, dropout, cut rows                            |

`auto` takes the platform's fused kernel if it serves the call, else xla.
"""

import dataclasses

from megatransformer_jax.config.option import UserError

KERNELS = ("auto", "xla", "cudnn", "splash")
PLATFORM_KERNELS = {"cpu": "xla", "gpu": "cudnn", "tpu": "splash"}
CUDNN_MAX_HEAD_WIDTH = 128
SPLASH_BLOCK = 128
SPLASH_HEAD_MULTIPLE = 64


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
    row_shards: int = 1  # devices that the query rows are cut over

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
    if features.row_shards > 1:
        obstacles.append(
            f"it needs whole rows, but they are cut over {features.row_shards} devices "
            "(mesh axis 'sequence')"
        )
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
    return obstacles


def _splash_obstacles(features: AttentionFeatures) -> list[str]:
    obstacles = []
    if features.dtype not in ("bfloat16", "float32"):
        obstacles.append(f"it needs bfloat16 or float32, not {features.dtype}")
    if features.head_width % SPLASH_HEAD_MULTIPLE:
        obstacles.append(
            f"it needs a head width that is a multiple of {SPLASH_HEAD_MULTIPLE}, "
            f"not {features.head_width}"
        )
    if features.static_offset is None:
        obstacles.append("it needs query_offset as a Python int, not an array")
    sizes = {
        "T": features.query_length,
        "S": features.key_length,
        "query_offset": features.static_offset or 0,
    }
    odd = [f"{name}={size}" for name, size in sizes.items() if size % SPLASH_BLOCK]
    if odd:
        obstacles.append(f"it needs multiples of {SPLASH_BLOCK}, not {', '.join(odd)}")
    return obstacles
