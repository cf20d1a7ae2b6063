"""Position schemes as pure functions: rotary, sinusoidal, ALiBi.

Rotary angles depend on positions only, so a forward pass computes `rotary_table` once and every
layer and iteration reuses it through `apply_rotary`.
"""

import math
import typing

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

CONVENTIONS = ("half", "interleaved")


class RotaryTable(typing.NamedTuple):
    """Cosine and sine of every rotation angle, float32 [B, T, H/2]."""

    cos: Float[Array, "B T half_H"]
    sin: Float[Array, "B T half_H"]


def rotary_table(positions: Int[Array, "B T"], head_width: int, base: float) -> RotaryTable:
    """Angles of rotary embedding (RoFormer, arXiv 2104.09864), always in float32.

    Pair i turns by `position * base ** (-2 i / H)` radians. Raises ValueError if H is odd.
    """
    if head_width % 2:
        raise ValueError(
            f"head width is {head_width}; rotary positions rotate pairs, make it even."
        )
    pair = jnp.arange(head_width // 2, dtype=jnp.float32)
    frequency = 1.0 / base ** (2.0 * pair / head_width)
    angle = positions.astype(jnp.float32)[..., None] * frequency
    return RotaryTable(jnp.cos(angle), jnp.sin(angle))


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
