"""What decoders of images share: checked input, and a network that a loop may call."""

from typing import Any

import jax
from flax import linen as nn

from megatransformer_jax.models.decoders.decoder import Condition
from megatransformer_jax.models.decoders.guidance import Denoiser


def check_images(
    images: jax.Array | None, lengths: jax.Array | None, shape: tuple[int, int, int]
) -> None:
    """Raises ValueError if images are not of `shape`, or lengths are given, which none has."""
    if lengths is not None:
        raise ValueError(
            f"lengths of shape {lengths.shape} were given for images, which have none; give None."
        )
    if images is not None and images.shape[1:] != shape:
        raise ValueError(
            f"images have shape {images.shape[1:]} (height, width, channels), but the decoder "
            f"draws {shape}; resize them or change the config."
        )


def denoiser_of(network: nn.Module) -> Denoiser:
    """A bound network as a pure function: loops of JAX must not call a bound module."""
    unbound, variables = network.unbind()

    def denoise(noisy: jax.Array, time: jax.Array, condition: Condition) -> Any:
        return unbound.apply(variables, noisy, time, condition.context, condition.is_context)

    return denoise
