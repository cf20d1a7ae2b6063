"""A vocoder of transposed convolutions and dilated residual blocks, up to the rate of samples."""

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from megatransformer_jax.config.vocoder import VocoderConfig
from megatransformer_jax.nn.vocoder_blocks import (
    Convolution,
    DilatedResidualBlock,
    Upsampling,
    activate,
    mask,
)
from megatransformer_jax.types import DTypePolicy


class HifiganGenerator(nn.Module):
    """HiFi-GAN's generator (arXiv 2010.05646): after each upsampling the mean of residual blocks
    of several kernels, so that several ranges are seen at once."""

    config: VocoderConfig
    policy: DTypePolicy

    @nn.compact
    def __call__(
        self, mels: Float[Array, "N F M"], lengths: Int[Array, "N"]
    ) -> Float[Array, "N samples"]:
        """Waveforms of `F * hop_samples` samples in [-1, 1], 0 beyond each clip.

        Args:
          mels: normalised; what is beyond a clip is not read.
          lengths: frames of each clip.
        """
        config, width, rate = self.config.hifigan, self.config.width, 1

        def is_valid() -> Array:
            steps = jnp.arange(mels.shape[1] * rate)
            return (steps < lengths[:, None] * rate)[..., None]

        x = Convolution(width, 7, self.policy, name="input")(mask(mels, is_valid()))
        x = mask(x, is_valid())
        for stage, factor in enumerate(config.upsample_rates):
            rate, width = rate * factor, width // 2
            x = activate(config.activation, f"snake_{stage}")(x)
            x = mask(Upsampling(width, factor, self.policy, name=f"up_{stage}")(x), is_valid())
            blocks = [
                DilatedResidualBlock(
                    size,
                    config.dilations,
                    config.activation,
                    self.policy,
                    name=f"block_{stage}_{index}",
                )(x, is_valid())
                for index, size in enumerate(config.kernel_sizes)
            ]
            x = sum(blocks[1:], blocks[0]) / len(blocks)
        x = activate(config.activation, "snake_output")(x)
        x = Convolution(1, 7, self.policy, name="output")(x).astype(jnp.float32)
        return mask(jnp.tanh(x), is_valid())[..., 0]
