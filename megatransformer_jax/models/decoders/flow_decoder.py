"""A decoder of images that learns and samples a flow."""

from typing import Any

import jax

from megatransformer_jax.config.decoders import FlowConfig, FlowSamplerConfig
from megatransformer_jax.models.decoders.decoder import Condition
from megatransformer_jax.models.decoders.flow import flow_loss, sample_flow
from megatransformer_jax.models.decoders.guidance import Denoiser
from megatransformer_jax.models.decoders.image_decoder import ImageDecoder


class FlowDecoder(ImageDecoder):
    """The network predicts the velocity. The loss has one term, 'loss'.

    Attributes:
      flow: as it is trained.
      sampler: as it is sampled unless told otherwise.
    """

    flow: FlowConfig
    sampler: FlowSamplerConfig

    def process_loss(
        self, denoise: Denoiser, media: jax.Array, condition: Condition, key: jax.Array
    ) -> dict[str, jax.Array]:
        """See `ImageDecoder`."""
        return flow_loss(
            denoise,
            self.flow,
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
        settings: FlowSamplerConfig | None,
        guidance_scale: Any,
    ) -> jax.Array:
        """See `ImageDecoder`."""
        return sample_flow(
            denoise,
            self.sampler if settings is None else settings,
            condition,
            self.shape,
            key,
            guidance_scale=guidance_scale,
        )
