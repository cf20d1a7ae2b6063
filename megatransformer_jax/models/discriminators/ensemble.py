"""All discriminators of a vocoder as one module."""

from flax import linen as nn
from jaxtyping import Array, Float

from megatransformer_jax.config.vocoder import DiscriminatorConfig
from megatransformer_jax.models.discriminators.multi_period import PeriodDiscriminator
from megatransformer_jax.models.discriminators.multi_scale import ScaleDiscriminator, half_rate
from megatransformer_jax.types import DTypePolicy

# Of one discriminator, all its convolutions in order; the last one's output is the score.
Features = list[Array]


class Discriminators(nn.Module):
    """Multi-period (arXiv 2010.05646) and multi-scale (arXiv 1910.06711) discriminators."""

    config: DiscriminatorConfig
    policy: DTypePolicy

    @nn.compact
    def __call__(self, waveforms: Float[Array, "N samples"]) -> list[Features]:
        """The features of every discriminator; see `Features`."""
        config = self.config
        outputs = [
            PeriodDiscriminator(period, config.width, self.policy, name=f"period_{period}")(
                waveforms
            )
            for period in config.periods
        ]
        for scale in range(config.num_scales):
            if scale:
                waveforms = half_rate(waveforms)
            discriminator = ScaleDiscriminator(config.width, self.policy, name=f"scale_{scale}")
            outputs.append(discriminator(waveforms))
        return outputs
