"""From frames to fewer, wider ones, by strided convolutions."""

import jax
from flax import linen as nn
from jaxtyping import Array, Float, Int

from megatransformer_jax.nn.masked_convolution import MaskedConvolution, fan_in_init, frame_mask
from megatransformer_jax.types import DTypePolicy


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
