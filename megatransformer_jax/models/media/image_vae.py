"""A variational autoencoder of images (arXiv 1312.6114), for decoders in latent space.

Its latents have their own scale, one number per channel that brings them to a root mean square of
1 (latent diffusion, arXiv 2112.10752, does it with one number measured after training). It is
learned along with the rest by a term of the loss that reaches nothing else.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Key

from megatransformer_jax.config.image import ImageVaeConfig
from megatransformer_jax.nn.conv import Convolution
from megatransformer_jax.nn.norms import GroupNorm
from megatransformer_jax.nn.parameters import vector
from megatransformer_jax.nn.unet import Downsample, ResidualBlock, Upsample
from megatransformer_jax.types import DTypePolicy

# Keeps variances and their inverses finite.
LOG_VARIANCE_RANGE = (-20.0, 10.0)
# A scale of channels that are always zero would have no limit.
MIN_RMS = 1e-3


class ImageEncoder(nn.Module):
    """Images to the mean and the log-variance of their latents, side by side in the channels."""

    config: ImageVaeConfig
    policy: DTypePolicy

    @nn.compact
    def __call__(self, images: Float[Array, "N height width C"]) -> Float[Array, "N h w C2"]:
        """Encodes; float32."""
        config, policy = self.config, self.policy
        x = Convolution(config.base_width, policy, name="conv_in")(images)
        for level, multiplier in enumerate(config.width_multipliers):
            if level:
                x = Downsample(policy, name=f"half_{level}")(x)
            x = _blocks(x, config, multiplier, policy, f"level_{level}")
        x = jax.nn.silu(GroupNorm(config.norm_groups, name="norm_out")(x))
        x = Convolution(2 * config.latent_channels, policy, name="conv_out")(x)
        return x.astype(jnp.float32)


class ImageDecoder(nn.Module):
    """Latents to images."""

    config: ImageVaeConfig
    channels: int
    policy: DTypePolicy

    @nn.compact
    def __call__(self, latents: Float[Array, "N h w C"]) -> Float[Array, "N height width C2"]:
        """Decodes; float32, not limited to [-1, 1]."""
        config, policy = self.config, self.policy
        multipliers = config.width_multipliers
        x = Convolution(config.base_width * multipliers[-1], policy, name="conv_in")(latents)
        for level in reversed(range(len(multipliers))):
            x = _blocks(x, config, multipliers[level], policy, f"level_{level}")
            if level:
                x = Upsample(policy, name=f"double_{level}")(x)
        x = jax.nn.silu(GroupNorm(config.norm_groups, name="norm_out")(x))
        return Convolution(self.channels, policy, name="conv_out")(x).astype(jnp.float32)


class ImageVae(nn.Module):
    """Encoder, decoder and scale of latents. Images are [N, height, width, C] in [-1, 1]."""

    config: ImageVaeConfig
    channels: int
    policy: DTypePolicy

    def setup(self) -> None:
        """Declares the parts."""
        self.encoder = ImageEncoder(self.config, self.policy)
        self.decoder = ImageDecoder(self.config, self.channels, self.policy)
        shape = (self.config.latent_channels,)
        self.latent_scale = vector(self, "latent_scale", nn.initializers.ones, shape)

    def __call__(
        self, images: Float[Array, "N height width C"]
    ) -> Float[Array, "N height width C"]:
        """What is left of images after encoding and decoding, without noise.

        Raises:
          ValueError: as `encode`.
        """
        return self.decode(self.encode(images)[0])

    def encode(
        self, images: Float[Array, "N height width C"]
    ) -> tuple[Float[Array, "N h w C2"], Float[Array, "N h w C2"]]:
        """Mean and log-variance of the images' latents.

        Raises:
          ValueError: if the images have other channels, or sides that cannot be halved.
        """
        times = self.config.shrinkage
        _, height, width, channels = images.shape
        if channels != self.channels or height % times or width % times:
            raise ValueError(
                f"images have shape {images.shape[1:]} (height, width, channels); the autoencoder "
                f"needs {self.channels} channels and sides that are multiples of {times}."
            )
        mean, log_variance = jnp.split(self.encoder(images), 2, axis=-1)
        return mean, jnp.clip(log_variance, *LOG_VARIANCE_RANGE)

    def decode(self, latents: Float[Array, "N h w C2"]) -> Float[Array, "N height width C"]:
        """The images of latents as `encode` makes them."""
        return self.decoder(latents)

    def to_latent(self, images: Float[Array, "N height width C"]) -> Float[Array, "N h w C2"]:
        """Mean latents times their scale: what a decoder in latent space learns to draw."""
        return self.encode(images)[0] * self.latent_scale

    def from_latent(self, latents: Float[Array, "N h w C2"]) -> Float[Array, "N height width C"]:
        """Images in [-1, 1] of latents as `to_latent` makes them."""
        return jnp.clip(self.decode(latents / self.latent_scale), -1.0, 1.0)


def build_image_vae(config: ImageVaeConfig, channels: int, policy: DTypePolicy) -> ImageVae:
    """The autoencoder of images with this many channels; parameters by `init_image_vae`."""
    return ImageVae(config, channels, policy)


def init_image_vae(model: ImageVae, key: Key[Array, ""]) -> Any:
    """Fresh parameters, each in a box with its logical axes (`nn.meta.unbox` opens them)."""
    side = model.config.shrinkage
    images = jnp.zeros((1, side, side, model.channels), jnp.float32)
    return model.init(key, images)["params"]


def vae_loss(
    model: ImageVae,
    params: Any,
    images: Float[Array, "N height width C"],
    key: Key[Array, ""],
    kl_weight: float | Float[Array, ""],
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Mean squared error + kl_weight * KL + the term of the latents' scale.

    Args:
      model: the autoencoder.
      params: its parameters.
      images: in [-1, 1].
      key: of the noise on latents.
      kl_weight: see `ImageVaeTrainingConfig`.

    Returns:
      The loss, and 'squared_error' per pixel value, 'kl' in nats per latent value, 'scale_error',
      the mean square of what scaled latents' root mean squares lack to 1.
    """
    variables = {"params": params}
    moments: Any = model.apply(variables, images, method="encode")
    mean, log_variance = moments
    noise = jax.random.normal(key, mean.shape)
    latents = mean + jnp.exp(0.5 * log_variance) * noise
    restored: Any = model.apply(variables, latents, method="decode")
    squared_error = jnp.mean(jnp.square(restored - images))
    variance = jnp.exp(log_variance)
    kl = 0.5 * jnp.mean(jnp.square(mean) + variance - 1.0 - log_variance)
    rms = jnp.sqrt(jnp.mean(jnp.square(jax.lax.stop_gradient(mean)), axis=(0, 1, 2)))
    scaled = params["latent_scale"] * jnp.maximum(rms, MIN_RMS)
    scale_error = jnp.mean(jnp.square(scaled - 1.0))
    loss = squared_error + kl_weight * kl + scale_error
    return loss, {"squared_error": squared_error, "kl": kl, "scale_error": scale_error}


def _blocks(
    x: jax.Array, config: ImageVaeConfig, multiplier: int, policy: DTypePolicy, name: str
) -> jax.Array:
    """The residual blocks of a resolution."""
    for index in range(config.blocks_per_level):
        block = ResidualBlock(
            config.base_width * multiplier, config.norm_groups, policy, name=f"{name}_block_{index}"
        )
        x = block(x)
    return x
