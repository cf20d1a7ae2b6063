"""Bricks of vocoders and of their discriminators: convolutions over time and residual blocks.

Sequences are [N, T, C]. A block gets `is_valid` [N, T, 1] and keeps what is beyond a clip at zero,
where a convolution would otherwise carry it into the clip.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float

from megatransformer_jax.nn.norms import layer_normalize
from megatransformer_jax.nn.parameters import matrix, vector
from megatransformer_jax.types import DTypePolicy

LEAKY_SLOPE = 0.1
_NORM_EPS = 1e-6
_LAYOUT = ("NWC", "WIO", "NWC")


def mask(signal: Float[Array, "N T C"], is_valid: Bool[Array, "N #T 1"]) -> Float[Array, "N T C"]:
    """Zero where not valid, whatever was there."""
    return jnp.where(is_valid, signal, 0)


def leaky_relu(signal: jax.Array) -> jax.Array:
    """Identity above zero, a tenth below, as in HiFi-GAN."""
    return jax.nn.leaky_relu(signal, LEAKY_SLOPE)


class Convolution(nn.Module):
    """A convolution over time that gives `ceil(T / stride)` steps of `features` channels."""

    features: int
    kernel_size: int
    policy: DTypePolicy
    stride: int = 1
    dilation: int = 1
    gain: float = 1.0  # of the initial standard deviation, gain / sqrt(inputs)

    @nn.compact
    def __call__(self, signal: Float[Array, "N T C"]) -> Float[Array, "N _T _C"]:
        """Convolves; outside of the signal are zeros."""
        shape = (self.kernel_size, signal.shape[-1], self.features)
        std = self.gain / math.sqrt(shape[0] * shape[1])
        init = nn.initializers.truncated_normal(std)
        kernel = matrix(self, "kernel", init, shape, (None, None, None), self.policy)
        bias = vector(self, "bias", nn.initializers.zeros, (self.features,))
        out = jax.lax.conv_general_dilated(
            signal.astype(self.policy.compute),
            kernel,
            (self.stride,),
            "SAME",
            rhs_dilation=(self.dilation,),
            dimension_numbers=_LAYOUT,
        )
        return out + bias.astype(out.dtype)


class Upsampling(nn.Module):
    """A transposed convolution that gives exactly `rate` steps for each; kernel of 2 rates."""

    features: int
    rate: int
    policy: DTypePolicy

    @nn.compact
    def __call__(self, signal: Float[Array, "N T C"]) -> Float[Array, "N _T _C"]:
        """[N, T, C] to [N, T * rate, features]."""
        shape = (2 * self.rate, signal.shape[-1], self.features)
        # Two taps reach each output.
        init = nn.initializers.truncated_normal(1 / math.sqrt(2 * shape[1]))
        kernel = matrix(self, "kernel", init, shape, (None, None, None), self.policy)
        bias = vector(self, "bias", nn.initializers.zeros, (self.features,))
        out = jax.lax.conv_transpose(
            signal.astype(self.policy.compute),
            kernel,
            (self.rate,),
            "SAME",
            dimension_numbers=_LAYOUT,
        )
        return out + bias.astype(out.dtype)


class Snake(nn.Module):
    """x + sin^2(alpha x) / alpha with one alpha per channel (arXiv 2006.08195)."""

    @nn.compact
    def __call__(self, signal: Float[Array, "N T C"]) -> Float[Array, "N T C"]:
        """Same shape and type."""
        alpha = vector(self, "alpha", nn.initializers.ones, (signal.shape[-1],))
        # Kept off zero, which alpha may cross.
        inverse = 1 / jnp.where(jnp.abs(alpha) < 1e-3, 1e-3, alpha)
        x = signal.astype(jnp.float32)
        return (x + inverse * jnp.square(jnp.sin(alpha * x))).astype(signal.dtype)


class ConvNextBlock(nn.Module):
    """x + scale * MLP(LayerNorm(depthwise convolution(x))), arXiv 2201.03545 over time."""

    kernel_size: int
    expansion: int
    start_scale: float
    policy: DTypePolicy

    @nn.compact
    def __call__(
        self, signal: Float[Array, "N T C"], is_valid: Bool[Array, "N #T 1"]
    ) -> Float[Array, "N T C"]:
        """`signal` must be zero where not valid; so is the result."""
        width = signal.shape[-1]
        x = self._depthwise(signal, width)
        scale = vector(self, "norm_scale", nn.initializers.ones, (width,))
        bias = vector(self, "norm_bias", nn.initializers.zeros, (width,))
        x = layer_normalize(x, scale, bias, _NORM_EPS)
        x = Convolution(self.expansion * width, 1, self.policy, name="up")(x)
        x = Convolution(width, 1, self.policy, name="down")(jax.nn.gelu(x))
        start = nn.initializers.constant(self.start_scale)
        x = x * vector(self, "scale", start, (width,)).astype(x.dtype)
        return mask(signal + x, is_valid)

    def _depthwise(self, signal: jax.Array, width: int) -> jax.Array:
        """As a sum of shifted signals: XLA's grouped convolutions are slow on CPUs."""
        size, length = self.kernel_size, signal.shape[1]
        init = nn.initializers.truncated_normal(1 / math.sqrt(size))
        kernel = matrix(self, "kernel", init, (size, width), (None, None), self.policy)
        bias = vector(self, "bias", nn.initializers.zeros, (width,))
        padded = jnp.pad(signal, ((0, 0), (size // 2, size // 2), (0, 0)))
        shifted = [padded[:, tap : tap + length] * kernel[tap] for tap in range(size)]
        return sum(shifted[1:], shifted[0]) + bias.astype(signal.dtype)


class DilatedResidualBlock(nn.Module):
    """Pairs of convolutions, the first of each dilated, each pair added to its input (HiFi-GAN)."""

    kernel_size: int
    dilations: tuple[int, ...]
    activation: str
    policy: DTypePolicy

    @nn.compact
    def __call__(
        self, signal: Float[Array, "N T C"], is_valid: Bool[Array, "N #T 1"]
    ) -> Float[Array, "N T C"]:
        """`signal` must be zero where not valid; so is the result."""
        width = signal.shape[-1]
        for index, dilation in enumerate(self.dilations):
            x = activate(self.activation, f"snake_{index}_first")(signal)
            x = Convolution(
                width, self.kernel_size, self.policy, dilation=dilation, name=f"dilated_{index}"
            )(x)
            x = activate(self.activation, f"snake_{index}_second")(mask(x, is_valid))
            x = Convolution(width, self.kernel_size, self.policy, gain=0.5, name=f"plain_{index}")(
                x
            )
            signal = mask(signal + x, is_valid)
        return signal


def activate(kind: str, name: str) -> Callable[[jax.Array], jax.Array]:
    """The configured nonlinearity; both keep zeros at zero."""
    match kind:
        case "leaky_relu":
            return leaky_relu
        case "snake":
            return Snake(name=name)
    raise ValueError(f"unknown activation {kind!r}; known: leaky_relu, snake")
