"""What a decoder of images or sound is: the protocol, and what it is conditioned on.

Decoders of images share the second half: checked input, the network, guidance.
"""

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct
from jaxtyping import Array, Bool, Float, Int, Key

# ------------------------------------------------------------------------------
# The protocol.


@struct.dataclass
class Condition:
    """What the codas say about N media to be made.

    Attributes:
      context: up to C vectors for each.
      is_context: which of them there are. All False: nothing is said, an unconditional draw.
    """

    context: Float[Array, "N C D"]
    is_context: Bool[Array, "N C"]


@runtime_checkable
class MediaDecoder(Protocol):
    """Makes media from conditions. A Flax module; both methods are called on a bound one.

    `lengths` are frames of clips, [N], and None for images.
    """

    def loss(
        self,
        media: Float[Array, "N ..."],
        lengths: Int[Array, "N"] | None,
        condition: Condition,
        key: Key[Array, ""],
    ) -> dict[str, Float[Array, "N"]]:
        """Terms of the loss of each medium, float32: 'loss' is what is minimised, others are its
        parts, for metrics. A medium's terms do not depend on the other media of the call.

        Args:
          media: images [N, height, width, C] or mel spectrograms [N, F, M].
          lengths: see above.
          condition: of each.
          key: of noise, time steps and dropped conditions.
        """

    def sample(
        self,
        condition: Condition,
        key: Key[Array, ""],
        lengths: Int[Array, "N"] | None = None,
        settings: Any = None,
    ) -> tuple[Float[Array, "N ..."], Int[Array, "N"] | None]:
        """Draws one medium per condition.

        Args:
          condition: of each.
          key: of the draw.
          lengths: frames to make; None: the decoder decides.
          settings: of the sampler (steps, guidance); None: the config's.

        Returns:
          Media, zeros beyond their lengths, and the lengths.
        """


def decoder_keys(key: Key[Array, ""], count: int) -> Key[Array, "N"]:
    """A key per medium, so that none depends on how many others there are."""
    return jax.vmap(jax.random.fold_in, (None, 0))(key, jax.numpy.arange(count))


# ------------------------------------------------------------------------------
# Classifier-free guidance (arXiv 2207.12598): conditions that are dropped, and two predictions.

# From noisy media [N, ...], times [N] in [0, 1] and conditions to a prediction [N, ...].
Denoiser = Callable[[jax.Array, jax.Array, Condition], jax.Array]


def without_context(condition: Condition) -> Condition:
    """Conditions that say nothing; networks put what they learned for this case in their place."""
    return condition.replace(is_context=jnp.zeros_like(condition.is_context))  # type: ignore[attr-defined]


def drop_conditions(condition: Condition, keys: Key[Array, "N"], rate: float) -> Condition:
    """Each condition says nothing with probability `rate`."""
    if rate == 0.0:
        return condition
    is_kept = jax.vmap(lambda key: jax.random.bernoulli(key, 1.0 - rate))(keys)
    return condition.replace(  # type: ignore[attr-defined]
        is_context=condition.is_context & is_kept[:, None]
    )


def guided(denoise: Denoiser, scale: Float[Array, ""] | float) -> Denoiser:
    """A denoiser that predicts unconditional + scale * (conditional - unconditional).

    Both predictions come from one call on twice as many media.
    """

    def denoise_guided(noisy: jax.Array, time: jax.Array, condition: Condition) -> jax.Array:
        twice = jax.tree.map(
            lambda *pair: jnp.concatenate(pair), condition, without_context(condition)
        )
        both = denoise(jnp.concatenate((noisy, noisy)), jnp.concatenate((time, time)), twice)
        conditional, unconditional = jnp.split(both, 2)
        return unconditional + scale * (conditional - unconditional)

    return denoise_guided


def apply_guidance(
    denoise: Denoiser, configured: float, given: Float[Array, ""] | float | None
) -> Denoiser:
    """Guidance by `given`, which may be traced, or else by the configured scale.

    A configured scale of 1 asks for the conditional prediction alone, which is one call.
    """
    if given is not None:
        return guided(denoise, given)
    return denoise if configured == 1.0 else guided(denoise, configured)


# ------------------------------------------------------------------------------
# What decoders of images share: checked input, and a network that a loop may call.


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


# ------------------------------------------------------------------------------
# What decoders of images share, whatever process they learn: checks, the network, the range.


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
