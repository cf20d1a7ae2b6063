"""RMSNorm and LayerNorm, computed in float32 whatever the activations are."""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from megatransformer_jax.config.model import NormConfig
from megatransformer_jax.nn.parameters import vector


def rms_normalize(
    array: Float[Array, "*batch D"], scale: Float[Array, "D"], eps: float
) -> Float[Array, "*batch D"]:
    """x / sqrt(mean(x^2) + eps) * scale over the last axis (arXiv 1910.07467)."""
    x = array.astype(jnp.float32)
    inverse = jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + eps)
    return (x * inverse * scale).astype(array.dtype)


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
