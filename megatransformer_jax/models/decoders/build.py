"""Chooses the decoders of images and of sound."""

from typing import Any

from megatransformer_jax.config.audio import AudioConfig
from megatransformer_jax.config.image import ImageConfig
from megatransformer_jax.models.decoders.diffusion_decoder import DiffusionDecoder
from megatransformer_jax.models.decoders.flow_decoder import FlowDecoder
from megatransformer_jax.models.decoders.image_decoder import ImageDecoder
from megatransformer_jax.models.decoders.latent import LatentDecoder
from megatransformer_jax.models.decoders.mel_diffusion import MelDiffusionDecoder
from megatransformer_jax.models.image_vae import ImageVae
from megatransformer_jax.nn.dit import Dit
from megatransformer_jax.nn.unet import UNet
from megatransformer_jax.sharding.rules import Sharder
from megatransformer_jax.types import DTypePolicy


def build_image_decoder(
    config: ImageConfig, policy: DTypePolicy, sharder: Sharder, platform: str
) -> Any:
    """The `MediaDecoder` of images that `config.decoder` asks for.

    Args:
      config: the images' format, and the decoder.
      policy: types.
      sharder: places what is cut over devices.
      platform: of the devices: 'cpu', 'gpu' or 'tpu'.

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
                network=UNet(decoder.unet, policy, parent=None),
                diffusion=decoder.diffusion,
                sampler=decoder.sampler,
                **shared,
            )
        case "dit":
            inner = FlowDecoder(
                network=Dit(decoder.dit, policy, sharder, platform, parent=None),
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


def build_audio_decoder(config: AudioConfig, policy: DTypePolicy) -> Any:
    """The `MediaDecoder` of sound. Its weights are whole on every device."""
    return MelDiffusionDecoder(config, policy)
