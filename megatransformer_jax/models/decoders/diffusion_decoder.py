"""A decoder of images that learns and samples a diffusion."""

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int, Key

from megatransformer_jax.config.diffusion import DiffusionConfig, SamplerConfig
from megatransformer_jax.models.decoders.decoder import Condition
from megatransformer_jax.models.decoders.diffusion import diffusion_loss
from megatransformer_jax.models.decoders.image_input import check_images, denoiser_of
from megatransformer_jax.models.decoders.samplers import sample_diffusion


class DiffusionDecoder(nn.Module):
    """Any network that predicts noise or velocity, as a `MediaDecoder`.

    Attributes:
      network: (noisy [N, height, width, C], time [N], context, is_context) to a prediction.
      shape: height, width, channels of an image.
      diffusion: as it is trained.
      sampler: as it is sampled unless told otherwise.
      condition_dropout_rate: part of the media that are learned without a condition.
      is_bounded: what is drawn is in [-1, 1], as pixels are and latents are not.
    """

    network: nn.Module
    shape: tuple[int, int, int]
    diffusion: DiffusionConfig
    sampler: SamplerConfig
    condition_dropout_rate: float
    is_bounded: bool

    def loss(
        self,
        media: Float[Array, "N height width C"],
        lengths: Int[Array, "N"] | None,
        condition: Condition,
        key: Key[Array, ""],
    ) -> dict[str, Float[Array, "N"]]:
        """See `MediaDecoder.loss`: 'loss' and 'squared_error', of one time per image.

        Raises:
          ValueError: for images of another shape, or lengths.
        """
        check_images(media, lengths, self.shape)
        return diffusion_loss(
            lambda noisy, time, condition: self.network(
                noisy, time, condition.context, condition.is_context
            ),
            self.diffusion,
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
        settings: SamplerConfig | None = None,
        guidance_scale: Float[Array, ""] | float | None = None,
    ) -> tuple[Float[Array, "N height width C"], None]:
        """See `MediaDecoder.sample`. `guidance_scale` replaces that of the settings and may be
        traced.

        Raises:
          ValueError: for lengths, or more steps than the diffusion has times.
        """
        check_images(None, lengths, self.shape)
        images = sample_diffusion(
            denoiser_of(self.network),
            self.diffusion,
            self.sampler if settings is None else settings,
            condition,
            self.shape,
            key,
            guidance_scale=guidance_scale,
        )
        return (jnp.clip(images, -1.0, 1.0) if self.is_bounded else images), None
