"""What decoders of images share, whatever process they learn: checks, the network, the range."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int, Key

from megatransformer_jax.models.decoders.decoder import Condition
from megatransformer_jax.models.decoders.guidance import Denoiser
from megatransformer_jax.models.decoders.image_input import check_images, denoiser_of


class ImageDecoder(nn.Module):
    """Any network behind a process of noise, as a `MediaDecoder`; the process is a subclass's.

    Attributes:
      network: (noisy [N, height, width, C], time [N], context, is_context) to a prediction.
      shape: height, width, channels of an image.
      condition_dropout_rate: part of the media that are learned without a condition.
      is_bounded: what is drawn is in [-1, 1], as pixels are and latents are not.
    """

    network: nn.Module
    shape: tuple[int, int, int]
    condition_dropout_rate: float
    is_bounded: bool

    def loss(
        self,
        media: Float[Array, "N height width C"],
        lengths: Int[Array, "N"] | None,
        condition: Condition,
        key: Key[Array, ""],
    ) -> dict[str, Float[Array, "N"]]:
        """See `MediaDecoder.loss`; of one time per image.

        Raises:
          ValueError: for images of another shape, or lengths.
        """
        check_images(media, lengths, self.shape)

        def denoise(noisy: jax.Array, time: jax.Array, condition: Condition) -> Any:
            return self.network(noisy, time, condition.context, condition.is_context)

        return self.process_loss(denoise, media, condition, key)

    def sample(
        self,
        condition: Condition,
        key: Key[Array, ""],
        lengths: Int[Array, "N"] | None = None,
        settings: Any = None,
        guidance_scale: Float[Array, ""] | float | None = None,
    ) -> tuple[Float[Array, "N height width C"], None]:
        """See `MediaDecoder.sample`. `guidance_scale` replaces that of the settings and may be
        traced.

        Raises:
          ValueError: for lengths, or settings that the process cannot follow.
        """
        check_images(None, lengths, self.shape)
        denoise = denoiser_of(self.network)
        images = self.process_sample(denoise, condition, key, settings, guidance_scale)
        return (jnp.clip(images, -1.0, 1.0) if self.is_bounded else images), None

    def process_loss(
        self, denoise: Denoiser, media: jax.Array, condition: Condition, key: jax.Array
    ) -> dict[str, jax.Array]:
        """The loss terms of checked images."""
        raise NotImplementedError

    def process_sample(
        self,
        denoise: Denoiser,
        condition: Condition,
        key: jax.Array,
        settings: Any,
        guidance_scale: Any,
    ) -> jax.Array:
        """Images of any range; `settings` None: the config's."""
        raise NotImplementedError
