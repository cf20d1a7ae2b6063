"""Matrix products and convolutions for the networks of media: images, frames, masked clips.

Their weights are whole on every device: these networks are small next to the text's layers.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from megatransformer_jax.nn.parameters import Initializer, matrix, vector
from megatransformer_jax.types import DTypePolicy

# ------------------------------------------------------------------------------
# A product with a matrix, and convolutions of images.

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


# ------------------------------------------------------------------------------
# From frames to fewer, wider ones, by strided convolutions.


class ConvDownsampling(nn.Module):
    """One convolution of stride 1, then one of stride 2 per halving, GELU after each.

    As in Whisper (arXiv 2212.04356), with the number of halvings left open. A clip of l frames
    becomes ceil(l / 2) in each, whatever the padding behind it.
    """

    width: int
    num_halvings: int
    policy: DTypePolicy

    @nn.compact
    def __call__(
        self, frames: Float[Array, "N F C"], lengths: Int[Array, "N"]
    ) -> tuple[Float[Array, "N F2 D"], Int[Array, "N"]]:
        """Returns the shorter sequences, arbitrary beyond their lengths, and these lengths."""
        # 2: about half the variance passes GELU.
        init = fan_in_init(2.0)
        x = frames.astype(self.policy.compute)
        for layer in range(self.num_halvings + 1):
            stride = 1 if layer == 0 else 2
            name = f"convolution_{layer}"
            convolve = MaskedConvolution(
                self.width, self.policy, stride=stride, kernel_init=init, name=name
            )
            x = jax.nn.gelu(convolve(x, frame_mask(lengths, x.shape[1])))
            lengths = -(-lengths // stride)
        return x, lengths


# ------------------------------------------------------------------------------
# Convolution over frames of clips of different lengths.


def frame_mask(lengths: Int[Array, "N"], num_frames: int) -> Bool[Array, "N F"]:
    """True for the first `lengths[n]` frames."""
    return jnp.arange(num_frames) < lengths[:, None]


def fan_in_init(scale: float = 1.0) -> Initializer:
    """Truncated normal of standard deviation sqrt(scale / inputs of one output)."""
    return nn.initializers.variance_scaling(scale, "fan_in", "truncated_normal")


class MaskedConvolution(nn.Module):
    """Convolves frames and sees zeros outside the clip, so that padding never leaks into it.

    With an odd `size` and padding of size // 2 on both sides, output j is centred on the frame
    `j * stride`; of F frames there are ceil(F / stride).
    """

    channels: int
    policy: DTypePolicy
    size: int = 3
    stride: int = 1
    dilation: int = 1
    kernel_init: Initializer = nn.initializers.lecun_normal()
    bias: bool = True

    @nn.compact
    def __call__(
        self, x: Float[Array, "N F C"], is_frame: Bool[Array, "N F"]
    ) -> Float[Array, "N F2 C2"]:
        """Convolves; outputs beyond a clip are arbitrary, for the next layer to mask."""
        shape = (self.size, x.shape[-1], self.channels)
        kernel = matrix(self, "kernel", self.kernel_init, shape, (None, None, None), self.policy)
        before = self.dilation * (self.size // 2)
        y = jax.lax.conv_general_dilated(
            jnp.where(is_frame[..., None], x, 0).astype(kernel.dtype),
            kernel,
            window_strides=(self.stride,),
            padding=[(before, before)],
            rhs_dilation=(self.dilation,),
            dimension_numbers=("NWC", "WIO", "NWC"),
        )
        if self.bias:
            bias = vector(self, "bias", nn.initializers.zeros, (self.channels,))
            y = y + bias.astype(y.dtype)
        return y
