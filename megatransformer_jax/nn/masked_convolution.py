"""Convolution over frames of clips of different lengths."""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from megatransformer_jax.nn.parameters import Initializer, matrix, vector
from megatransformer_jax.types import DTypePolicy


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
