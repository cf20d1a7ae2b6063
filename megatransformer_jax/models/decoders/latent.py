"""A decoder of images that works on the latents of a trained autoencoder."""

from typing import Any

import jax
from flax import linen as nn
from jaxtyping import Array, Float, Int, Key

from megatransformer_jax.models.decoders.decoder import Condition
from megatransformer_jax.models.decoders.image_decoder import ImageDecoder
from megatransformer_jax.models.decoders.image_input import check_images
from megatransformer_jax.models.image_vae import ImageVae


class LatentDecoder(nn.Module):
    """Another decoder behind an autoencoder, as a `MediaDecoder` of images.

    No gradient reaches the autoencoder, whose parameters are the subtree `image_vae`.

    Attributes:
      image_vae: the autoencoder.
      decoder: draws its latents.
      shape: height, width, channels of an image.
    """

    image_vae: ImageVae
    decoder: ImageDecoder
    shape: tuple[int, int, int]

    def loss(
        self,
        media: Float[Array, "N height width C"],
        lengths: Int[Array, "N"] | None,
        condition: Condition,
        key: Key[Array, ""],
    ) -> dict[str, Float[Array, "N"]]:
        """The inner decoder's terms, of the images' latents.

        Raises:
          ValueError: for images of another shape, or lengths.
        """
        check_images(media, lengths, self.shape)
        latents = jax.lax.stop_gradient(self.image_vae.to_latent(media))
        if self.is_initializing():
            self.image_vae.from_latent(latents)
        return self.decoder.loss(latents, None, condition, key)

    def sample(
        self,
        condition: Condition,
        key: Key[Array, ""],
        lengths: Int[Array, "N"] | None = None,
        settings: Any = None,
        guidance_scale: Float[Array, ""] | float | None = None,
    ) -> tuple[Float[Array, "N height width C"], None]:
        """Draws latents as the inner decoder does, then the images that they stand for, in [-1, 1].

        Raises:
          ValueError: as the inner decoder.
        """
        latents, _ = self.decoder.sample(condition, key, lengths, settings, guidance_scale)
        return self.image_vae.from_latent(latents), None
