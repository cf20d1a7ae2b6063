"""A decoder of images that learns and samples a diffusion."""

from typing import Any

import jax

from megatransformer_jax.config.decoders import DiffusionConfig, SamplerConfig
from megatransformer_jax.models.decoders.decoder import Condition
from megatransformer_jax.models.decoders.diffusion import diffusion_loss
from megatransformer_jax.models.decoders.guidance import Denoiser
from megatransformer_jax.models.decoders.image_decoder import ImageDecoder
from megatransformer_jax.models.decoders.samplers import sample_diffusion


class DiffusionDecoder(ImageDecoder):
    """The network predicts noise or velocity. Terms of the loss: 'loss' and 'squared_error'.

    Attributes:
      diffusion: as it is trained.
      sampler: as it is sampled unless told otherwise.
    """

    diffusion: DiffusionConfig
    sampler: SamplerConfig

    def process_loss(
        self, denoise: Denoiser, media: jax.Array, condition: Condition, key: jax.Array
    ) -> dict[str, jax.Array]:
        """See `ImageDecoder`."""
        return diffusion_loss(
            denoise,
            self.diffusion,
            media,
            condition,
            key,
            condition_dropout_rate=self.condition_dropout_rate,
        )

    def process_sample(
        self,
        denoise: Denoiser,
        condition: Condition,
        key: jax.Array,
        settings: SamplerConfig | None,
        guidance_scale: Any,
    ) -> jax.Array:
        """See `ImageDecoder`; ValueError for more steps than the diffusion has times."""
        return sample_diffusion(
            denoise,
            self.diffusion,
            self.sampler if settings is None else settings,
            condition,
            self.shape,
            key,
            guidance_scale=guidance_scale,
        )
