"""A discriminator that hears every p-th sample (HiFi-GAN, arXiv 2010.05646)."""

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from megatransformer_jax.nn.vocoder_blocks import Convolution, leaky_relu
from megatransformer_jax.types import DTypePolicy

# Channels relative to the first, each convolution with a stride of 3.
_MULTIPLES = (1, 2, 4, 8)


class PeriodDiscriminator(nn.Module):
    """The waveform folded into `period` columns, each seen by the same convolutions."""

    period: int
    width: int
    policy: DTypePolicy

    @nn.compact
    def __call__(self, waveforms: Float[Array, "N samples"]) -> list[Array]:
        """Outputs of the convolutions, [N * period, ...] each; the last has one channel."""
        num_media, samples = waveforms.shape
        rows = -(-samples // self.period)
        x = jnp.pad(waveforms, ((0, 0), (0, rows * self.period - samples)))
        x = x.reshape(num_media, rows, self.period).swapaxes(1, 2).reshape(-1, rows, 1)
        features = []
        for index, multiple in enumerate(_MULTIPLES):
            x = leaky_relu(
                Convolution(
                    multiple * self.width, 5, self.policy, stride=3, name=f"strided_{index}"
                )(x)
            )
            features.append(x)
        x = leaky_relu(Convolution(x.shape[-1], 5, self.policy, name="plain")(x))
        return [*features, x, Convolution(1, 3, self.policy, name="score")(x)]
