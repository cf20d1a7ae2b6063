"""RMSNorm, LayerNorm, GroupNorm, computed in float32 whatever the activations are."""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from megatransformer_jax.config.model import NormConfig
from megatransformer_jax.nn.parameters import vector

# ------------------------------------------------------------------------------
# Norms of tokens.


def rms_normalize(
    array: Float[Array, "*batch D"],
    scale: Float[Array, "*scaled"] | None,
    eps: float,
    num_axes: int = 1,
) -> Float[Array, "*batch D"]:
    """x / sqrt(mean(x^2) + eps) * scale over the last axes (arXiv 1910.07467).

    Args:
      array: any type; computed in float32.
      scale: of the shape of the last `num_axes` axes. None: 1.
      eps: see the formula.
      num_axes: how many of the last axes are normalised together.
    """
    x = array.astype(jnp.float32)
    axes = tuple(range(-num_axes, 0))
    normalized = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=axes, keepdims=True) + eps)
    return (normalized if scale is None else normalized * scale).astype(array.dtype)


def layer_normalize(
    array: Float[Array, "*batch D"],
    scale: Float[Array, "D"],
    bias: Float[Array, "D"] | None,
    eps: float,
) -> Float[Array, "*batch D"]:
    """(x - mean) / sqrt(var + eps) * scale + bias over the last axis (arXiv 1607.06450)."""
    x = array.astype(jnp.float32)
    x = x - jnp.mean(x, axis=-1, keepdims=True)
    x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + eps) * scale
    return (x if bias is None else x + bias).astype(array.dtype)


class Norm(nn.Module):
    """The configured normalisation over the last axis, of width D."""

    config: NormConfig

    @nn.compact
    def __call__(self, array: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        """Normalises the last axis; output has the input's shape and type."""
        width = array.shape[-1]
        scale = vector(self, "scale", nn.initializers.ones, (width,))
        if self.config.kind == "rmsnorm":
            return rms_normalize(array, scale, self.config.eps)
        bias = None
        if self.config.bias:
            bias = vector(self, "bias", nn.initializers.zeros, (width,))
        return layer_normalize(array, scale, bias, self.config.eps)


# ------------------------------------------------------------------------------
# Group normalisation (arXiv 1803.08494), computed in float32 whatever the activations are.

EPS = 1e-5


def group_normalize(
    array: Float[Array, "N *space C"],
    num_groups: int,
    scale: Float[Array, "#N C"],
    bias: Float[Array, "#N C"],
    eps: float = EPS,
) -> Float[Array, "N *space C"]:
    """(x - mean) / sqrt(var + eps) * scale + bias, over space and the channels of each group.

    Args:
      array: the last axis is of channels.
      num_groups: divides the channels.
      scale: per channel; of each medium, or [1, C].
      bias: the same.
      eps: see the formula.

    Raises:
      ValueError: if num_groups does not divide the channels.
    """
    count, channels = array.shape[0], array.shape[-1]
    if channels % num_groups:
        raise ValueError(
            f"{channels} channels do not make {num_groups} groups; choose a divisor of {channels}."
        )
    x = array.astype(jnp.float32).reshape(count, -1, channels)

    def group_mean(values: jax.Array) -> jax.Array:
        # Space first: sums over the outer axis run over whole rows of channels.
        grouped = jnp.mean(values, axis=1).reshape(count, num_groups, -1)
        mean = jnp.mean(grouped, axis=-1, keepdims=True)
        return jnp.broadcast_to(mean, grouped.shape).reshape(count, 1, channels)

    x = x - group_mean(x)
    factor = jax.lax.rsqrt(group_mean(jnp.square(x)) + eps) * scale[:, None]
    y = x * factor + bias[:, None]
    return y.astype(array.dtype).reshape(array.shape)


class GroupNorm(nn.Module):
    """Group normalisation with a learned scale and bias per channel."""

    num_groups: int

    @nn.compact
    def __call__(
        self,
        array: Float[Array, "N *space C"],
        scale: Float[Array, "N C"] | None = None,
        shift: Float[Array, "N C"] | None = None,
    ) -> Float[Array, "N *space C"]:
        """Normalises; with `scale` and `shift` of each medium: norm * (1 + scale) + shift."""
        channels = array.shape[-1]
        own_scale = vector(self, "scale", nn.initializers.ones, (channels,))[None]
        own_bias = vector(self, "bias", nn.initializers.zeros, (channels,))[None]
        if scale is not None:
            factor = 1.0 + scale.astype(jnp.float32)
            own_scale, own_bias = own_scale * factor, own_bias * factor
        if shift is not None:
            own_bias = own_bias + shift.astype(jnp.float32)
        return group_normalize(array, self.num_groups, own_scale, own_bias)
