"""A decoder of images that learns and samples a flow."""

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int, Key

from megatransformer_jax.config.flow import FlowConfig, FlowSamplerConfig
from megatransformer_jax.models.decoders.decoder import Condition
from megatransformer_jax.models.decoders.flow import flow_loss, sample_flow
from megatransformer_jax.models.decoders.image_input import check_images, denoiser_of


class FlowDecoder(nn.Module):
    """Any network that predicts the velocity, as a `MediaDecoder`.

    Attributes:
      network: (noisy [N, height, width, C], time [N], context, is_context) to a velocity.
      shape: height, width, channels of an image.
      flow: as it is trained.
      sampler: as it is sampled unless told otherwise.
      condition_dropout_rate: part of the media that are learned without a condition.
      is_bounded: what is drawn is in [-1, 1], as pixels are and latents are not.
    """

    network: nn.Module
    shape: tuple[int, int, int]
    flow: FlowConfig
    sampler: FlowSamplerConfig
    condition_dropout_rate: float
    is_bounded: bool

    def loss(
        self,
        media: Float[Array, "N height width C"],
        lengths: Int[Array, "N"] | None,
        condition: Condition,
        key: Key[Array, ""],
    ) -> dict[str, Float[Array, "N"]]:
        """See `MediaDecoder.loss`: 'loss', of one time per image.

        Raises:
          ValueError: for images of another shape, or lengths.
        """
        check_images(media, lengths, self.shape)
        return flow_loss(
            lambda noisy, time, condition: self.network(
                noisy, time, condition.context, condition.is_context
            ),
            self.flow,
            media,
            condition,
            key,
            condition_dropout_rate=self.condition_dropout_rate,
        )

    def sample(
        self,
        condition: Condition,
        key: Key[Array, ""],
        lengths: Int[Array, "N"] | None = None,
        settings: FlowSamplerConfig | None = None,
        guidance_scale: Float[Array, ""] | float | None = None,
    ) -> tuple[Float[Array, "N height width C"], None]:
        """See `MediaDecoder.sample`. `guidance_scale` replaces that of the settings and may be
        traced.

        Raises:
          ValueError: for lengths.
        """
        check_images(None, lengths, self.shape)
        images = sample_flow(
            denoiser_of(self.network),
            self.sampler if settings is None else settings,
            condition,
            self.shape,
            key,
            guidance_scale=guidance_scale,
        )
        return (jnp.clip(images, -1.0, 1.0) if self.is_bounded else images), None
