"""A discriminator that hears a waveform at one rate (MelGAN, arXiv 1910.06711)."""

from flax import linen as nn
from jaxtyping import Array, Float

from megatransformer_jax.nn.vocoder_blocks import Convolution, leaky_relu
from megatransformer_jax.types import DTypePolicy

# Channels relative to the first, kernel and stride of each convolution.
_LAYERS = ((1, 15, 1), (2, 21, 4), (4, 21, 4), (8, 21, 4))


class ScaleDiscriminator(nn.Module):
    """Strided convolutions."""

    width: int
    policy: DTypePolicy

    @nn.compact
    def __call__(self, waveforms: Float[Array, "N samples"]) -> list[Array]:
        """Outputs of the convolutions, [N, ...] each; the last has one channel."""
        x = waveforms[..., None]
        features = []
        for index, (multiple, kernel, stride) in enumerate(_LAYERS):
            x = leaky_relu(
                Convolution(
                    multiple * self.width, kernel, self.policy, stride, name=f"strided_{index}"
                )(x)
            )
            features.append(x)
        x = leaky_relu(Convolution(x.shape[-1], 5, self.policy, name="plain")(x))
        return [*features, x, Convolution(1, 3, self.policy, name="score")(x)]


def half_rate(waveforms: Float[Array, "N samples"]) -> Float[Array, "N half"]:
    """Means of two samples; of an odd number the last is left out."""
    even = waveforms.shape[1] // 2 * 2
    return waveforms[:, :even].reshape(len(waveforms), -1, 2).mean(axis=-1)
