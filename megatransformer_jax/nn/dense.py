"""A product with a matrix, and convolutions of images, for networks of their own widths.

Their weights are whole on every device: these networks are small beside the text's layers.
"""

import jax
from flax import linen as nn
from jaxtyping import Array, Float

from megatransformer_jax.nn.parameters import Initializer, matrix, vector
from megatransformer_jax.types import DTypePolicy

FAN_IN = nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal")
ZEROS = nn.initializers.zeros


class Dense(nn.Module):
    """x @ kernel + bias over the last axis, in the policy's compute type."""

    width: int
    policy: DTypePolicy
    kernel_init: Initializer = FAN_IN
    bias: bool = True

    @nn.compact
    def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch D2"]:
        """Maps the last axis to `width`."""
        shape = (x.shape[-1], self.width)
        kernel = matrix(self, "kernel", self.kernel_init, shape, (None, None), self.policy)
        y = x.astype(kernel.dtype) @ kernel
        return _add_bias(self, y, self.width) if self.bias else y


class Convolution(nn.Module):
    """A convolution with zeros around the image, in the policy's compute type.

    With an odd `size`, of a side of n values there are ceil(n / stride).
    """

    channels: int
    policy: DTypePolicy
    size: int = 3
    stride: int = 1
    kernel_init: Initializer = FAN_IN

    @nn.compact
    def __call__(self, x: Float[Array, "N height width C"]) -> Float[Array, "N height2 width2 C2"]:
        """Convolves both sides."""
        shape = (self.size, self.size, x.shape[-1], self.channels)
        kernel = matrix(self, "kernel", self.kernel_init, shape, (None,) * 4, self.policy)
        y = jax.lax.conv_general_dilated(
            x.astype(kernel.dtype),
            kernel,
            window_strides=(self.stride, self.stride),
            padding=[(self.size // 2, self.size // 2)] * 2,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        return _add_bias(self, y, self.channels)


def _add_bias(module: nn.Module, y: jax.Array, width: int) -> jax.Array:
    return y + vector(module, "bias", ZEROS, (width,)).astype(y.dtype)
