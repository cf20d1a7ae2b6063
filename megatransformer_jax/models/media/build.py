"""Chooses the decoders of images and of sound, those that draw an autoencoder's latents too."""

import dataclasses
from typing import Any

import jax
from flax import linen as nn
from jaxtyping import Array, Float, Int, Key

from megatransformer_jax.config.audio import AudioConfig
from megatransformer_jax.config.image import ImageConfig, ImageVaeRunConfig
from megatransformer_jax.config.option import ConfigError
from megatransformer_jax.models.media.decoder import (
    Condition,
    ImageDecoder,
    MediaDecoder,
    check_images,
)
from megatransformer_jax.models.media.diffusion import DiffusionDecoder
from megatransformer_jax.models.media.flow import FlowDecoder
from megatransformer_jax.models.media.image_vae import ImageVae
from megatransformer_jax.models.media.mel_diffusion import MelDiffusionDecoder
from megatransformer_jax.nn.dit import Dit
from megatransformer_jax.nn.unet import UNet
from megatransformer_jax.sharding.rules import Sharder
from megatransformer_jax.types import DTypePolicy

# ------------------------------------------------------------------------------
# From a config to decoders.


def build_image_decoder(
    config: ImageConfig, policy: DTypePolicy, sharder: Sharder, platform: str, remat: str = "none"
) -> MediaDecoder:
    """The decoder of images that `config.decoder` asks for.

    Args:
      config: the images' format, and the decoder.
      policy: types.
      sharder: places what is cut over devices.
      platform: of the devices: 'cpu', 'gpu' or 'tpu'.
      remat: see `ModelConfig.remat`; applied to each layer of the network.

    Raises:
      ValueError: for an unknown kind.
    """
    decoder = config.decoder
    shared: dict[str, Any] = {
        "shape": config.drawn_shape,
        "condition_dropout_rate": decoder.condition_dropout_rate,
        "is_bounded": decoder.vae is None,
        "parent": None,
    }
    inner: ImageDecoder
    # Modules get no parent here: each becomes part of what it is given to.
    match decoder.kind:
        case "unet":
            inner = DiffusionDecoder(
                network=UNet(decoder.unet, policy, remat, parent=None),
                diffusion=decoder.diffusion,
                sampler=decoder.sampler,
                **shared,
            )
        case "dit":
            inner = FlowDecoder(
                network=Dit(decoder.dit, policy, sharder, platform, remat, parent=None),
                flow=decoder.flow,
                sampler=decoder.flow_sampler,
                **shared,
            )
        case _:
            raise ValueError(f"unknown kind of image decoder {decoder.kind!r}; known: unet, dit")
    if decoder.vae is None:
        return inner
    vae = ImageVae(decoder.vae_model, config.channels, policy, parent=None)
    return LatentDecoder(vae, inner, config.shape, parent=None)


def build_audio_decoder(
    config: AudioConfig, policy: DTypePolicy, remat: str = "none"
) -> MediaDecoder:
    """The decoder of sound. Its weights are whole on every device.

    Args:
      config: the clips' format, and the decoder.
      policy: types.
      remat: see `ModelConfig.remat`; applied to each block of the network.
    """
    return MelDiffusionDecoder(config, policy, remat)


# ------------------------------------------------------------------------------
# A decoder of images that works on the latents of a trained autoencoder.


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


# ------------------------------------------------------------------------------
# Puts a trained autoencoder into a model that draws its latents.

# Where a model keeps it. Parameters with this name in their path are never trained.
IMAGE_VAE = "image_vae"
_PATH = ("media", "image_decoder", IMAGE_VAE)


def check_image_vae(config: ImageConfig, trained: ImageVaeRunConfig) -> None:
    """Checks that a model's autoencoder is the one of a run.

    Raises:
      ConfigError: at an option of `model.image`, with both values. Sides may differ: the
        autoencoder is made of convolutions.
    """
    if config.channels != trained.channels:
        raise ConfigError(
            "model.image.channels",
            f"{config.channels}, but the autoencoder of {config.decoder.vae!r} was trained on "
            f"images of {trained.channels} channels; use another run or the same images.",
        )
    for field in dataclasses.fields(trained.model):
        ours, theirs = (
            getattr(model, field.name) for model in (config.decoder.vae_model, trained.model)
        )
        if ours != theirs:
            raise ConfigError(
                f"model.image.decoder.vae_model.{field.name}",
                f"{ours!r}, but the autoencoder of {config.decoder.vae!r} has {theirs!r}; set it "
                "to that.",
            )


def insert_image_vae(params: Any, vae_params: Any) -> Any:
    """The parameters of a model with `model.image.decoder.vae`, its autoencoder replaced.

    Args:
      params: of a `MegaTransformer`; not changed.
      vae_params: of an `ImageVae` that `check_image_vae` accepts.

    Raises:
      ValueError: if the autoencoder's parameters have other names or shapes.
    """

    def replaced(tree: Any, path: tuple[str, ...]) -> Any:
        if path:
            return {**tree, path[0]: replaced(tree[path[0]], path[1:])}
        wanted, given = (jax.tree.map(lambda leaf: leaf.shape, t) for t in (tree, vae_params))
        if wanted != given:
            raise ValueError(
                "the autoencoder's parameters do not fit the model's, which has other names or "
                "shapes; check_image_vae says which option differs."
            )
        return vae_params

    return replaced(params, _PATH)
