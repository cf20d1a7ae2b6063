"""Position schemes as pure functions: rotary, sinusoidal, ALiBi.

Rotary angles depend on positions only, so a forward pass computes `rotary_table` once and every
layer and iteration reuses it through `apply_rotary`.
"""

import math
import typing

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from megatransformer_jax.config.layers import RotaryScalingConfig

CONVENTIONS = ("half", "interleaved")


class RotaryTable(typing.NamedTuple):
    """Cosine and sine of every rotation angle, float32 [B, T, H/2].

    With YaRN both are multiplied by its attention factor.
    """

    cos: Float[Array, "B T half_H"]
    sin: Float[Array, "B T half_H"]


def rotary_table(
    positions: Int[Array, "B T"],
    head_width: int,
    base: float,
    scaling: RotaryScalingConfig | None = None,
) -> RotaryTable:
    """Angles of rotary embedding (RoFormer, arXiv 2104.09864), always in float32.

    Pair i turns by `position * base ** (-2 i / H)` radians, with `scaling` by less. Raises
    ValueError if H is odd.
    """
    if head_width % 2:
        raise ValueError(
            f"head width is {head_width}; rotary positions rotate pairs, make it even."
        )
    pair = jnp.arange(head_width // 2, dtype=jnp.float32)
    frequency = 1.0 / base ** (2.0 * pair / head_width)
    factor = 1.0
    if scaling is not None and scaling.kind != "none":
        frequency = frequency * _frequency_factors(head_width, base, scaling)
        factor = attention_factor(scaling)
    angle = positions.astype(jnp.float32)[..., None] * frequency
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    return RotaryTable(cos, sin) if factor == 1.0 else RotaryTable(cos * factor, sin * factor)


def attention_factor(scaling: RotaryScalingConfig) -> float:
    """What rotated queries and keys are multiplied by: YaRN's, or 1."""
    if scaling.kind != "yarn":
        return 1.0
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    return 0.1 * math.log(scaling.factor) + 1.0


def _frequency_factors(
    head_width: int, base: float, scaling: RotaryScalingConfig
) -> Float[np.ndarray, "half_H"]:
    """What each pair's frequency is multiplied by, from 1 / factor to 1, float32."""
    pair = np.arange(head_width // 2)
    turns = scaling.original_length * base ** (-2.0 * pair / head_width) / (2 * math.pi)
    match scaling.kind:
        case "linear":
            kept = np.zeros_like(turns)
        case "llama3":
            low, high = scaling.low_freq_factor, scaling.high_freq_factor
            kept = np.clip((turns - low) / (high - low), 0.0, 1.0)
        case "yarn":
            kept = 1.0 - _yarn_ramp(pair, head_width, base, scaling)
        case _:
            raise ValueError(
                f"unknown rotary scaling {scaling.kind!r}; known: none, linear, llama3, yarn"
            )
    return (kept + (1.0 - kept) / scaling.factor).astype(np.float32)


def _yarn_ramp(
    pair: np.ndarray, head_width: int, base: float, scaling: RotaryScalingConfig
) -> np.ndarray:
    """0 for pairs that turn at least `beta_fast` times in the original length, 1 for those that
    turn at most `beta_slow` times, and a straight line between, over the pair's number."""

    def pair_turning(turns: float) -> float:
        ratio = scaling.original_length / (turns * 2 * math.pi)
        return head_width * math.log(ratio) / (2 * math.log(base))

    low, high = pair_turning(scaling.beta_fast), pair_turning(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_width - 1)
    if low == high:
        high += 0.001  # As transformers does; a step in place of a line.
    return np.clip((pair - low) / (high - low), 0.0, 1.0)


def apply_rotary(
    x: Float[Array, "B T heads H"], table: RotaryTable, convention: str
) -> Float[Array, "B T heads H"]:
    """Rotates the channel pairs of every head; computed in float32, returned in x's type.

    Args:
      x: queries or keys.
      table: from `rotary_table` with x's positions and H.
      convention: which channels form pair i. 'half': (i, i + H/2), as Llama. 'interleaved':
        (2i, 2i + 1), as GPT-J and Huginn. Weights of one do not work with the other.

    Raises:
      ValueError: unknown convention.
    """
    cos, sin = table.cos[:, :, None, :], table.sin[:, :, None, :]
    wide = x.astype(jnp.float32)
    if convention == "half":
        first, second = jnp.split(wide, 2, axis=-1)
        rotated = (first * cos - second * sin, second * cos + first * sin)
        return jnp.concatenate(rotated, axis=-1).astype(x.dtype)
    if convention == "interleaved":
        pairs = wide.reshape(*x.shape[:-1], -1, 2)
        first, second = pairs[..., 0], pairs[..., 1]
        rotated = (first * cos - second * sin, second * cos + first * sin)
        return jnp.stack(rotated, axis=-1).reshape(x.shape).astype(x.dtype)
    raise ValueError(f"rotary convention is {convention!r}; choose one of {CONVENTIONS}.")


def sinusoidal_embedding(positions: Int[Array, "B T"], width: int) -> Float[Array, "B T D"]:
    """Fixed embedding of "Attention Is All You Need" (arXiv 1706.03762), float32.

    Channel 2i is sin(position / 10000^(2i/D)), channel 2i+1 the cosine. Raises ValueError if D is
    odd.
    """
    if width % 2:
        raise ValueError(f"width is {width}; sinusoidal positions need an even width.")
    table = rotary_table(positions, width, 10_000.0)
    return jnp.stack((table.sin, table.cos), axis=-1).reshape(*positions.shape, width)


def alibi_slopes(num_heads: int) -> Float[Array, "N"]:
    """Slope of each head's distance penalty (ALiBi, arXiv 2108.12409), float32, all positive.

    For N a power of two, head n gets 2^(-8 (n+1) / N). Otherwise the paper's code takes the slopes
    of the power of two below N, then every other slope of the power above, and so do we.
    """
    if num_heads < 1:
        raise ValueError(f"num_heads is {num_heads}; it must be at least 1.")
    below = 2 ** math.floor(math.log2(num_heads))
    slopes = [2.0 ** (-8.0 * (n + 1) / below) for n in range(below)]
    above = [2.0 ** (-8.0 * (n + 1) / (2 * below)) for n in range(2 * below)]
    return jnp.asarray(slopes + above[0::2][: num_heads - below], jnp.float32)
