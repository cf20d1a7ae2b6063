"""Encoders of images and sound: protocol, vision transformer, convolutions over mel frames."""

import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from megatransformer_jax.config.model import ModelConfig
from megatransformer_jax.models.media.coda import side_context, side_stack_config
from megatransformer_jax.nn.block import Stack
from megatransformer_jax.nn.conv import ConvDownsampling, frame_mask
from megatransformer_jax.nn.embedding import embedding_scale, patchify
from megatransformer_jax.nn.parameters import matrix, truncated_normal, vector, weight_init
from megatransformer_jax.sharding.rules import Sharder
from megatransformer_jax.types import DTypePolicy

# ------------------------------------------------------------------------------
# The protocol.


class Encoded(NamedTuple):
    """N media as vectors for the sequence.

    Attributes:
      embeddings: in the compute type, P places each; exact zeros where there is none.
      is_embedding: which of the places there are; the first ones of each medium.
    """

    embeddings: Float[Array, "N P D"]
    is_embedding: Bool[Array, "N P"]


@runtime_checkable
class Prelude(Protocol):
    """Encodes media. A Flax module, called on a bound one; needs the rng stream 'dropout' unless
    deterministic."""

    def __call__(
        self,
        media: Float[Array, "N ..."],
        lengths: Int[Array, "N"] | None,
        deterministic: bool,
    ) -> Encoded:
        """Encodes each medium by itself: no output depends on other media or on padding.

        Args:
          media: images [N, height, width, C] or mel spectrograms [N, F, M].
          lengths: frames of each clip, 0 for an unused slot; None for images.
          deterministic: no dropout.

        Raises:
          ValueError: if the shapes are not those of the config, or lengths are missing or too many.
        """


# ------------------------------------------------------------------------------
# From pieces of media, patches or frames, to vectors of the model's width.


class MediaEmbedding(nn.Module):
    """Linear, plus positions, then the dropout of embeddings.

    Starts such that pieces of unit size become vectors as large as the text's embeddings.
    """

    config: ModelConfig
    policy: DTypePolicy

    @nn.compact
    def __call__(
        self,
        pieces: Float[Array, "N P pieces"],
        positions: Float[Array, "P D"],
        deterministic: bool,
    ) -> Float[Array, "N P D"]:
        """Embeds each piece by itself; in the compute type."""
        config, inputs = self.config, pieces.shape[-1]
        std = weight_init(config, config.width).embedding_std * embedding_scale(config)
        init = truncated_normal(std / math.sqrt(inputs))
        shape, axes = (inputs, config.width), (None, "embed")
        kernel = matrix(self, "kernel", init, shape, axes, self.policy)
        bias = vector(self, "bias", nn.initializers.zeros, (config.width,))
        x = pieces.astype(kernel.dtype) @ kernel + (bias + positions).astype(kernel.dtype)
        dropout = nn.Dropout(config.embedding_dropout_rate)
        embedded: Float[Array, "N P D"] = dropout(x, deterministic=deterministic)
        return embedded


# ------------------------------------------------------------------------------
# The layers of an encoder of media.


def media_stack(
    config: ModelConfig, num_layers: int, policy: DTypePolicy, sharder: Sharder, platform: str
) -> Stack:
    """Layers of the model's width that see a whole medium, see `side_context`; named `layers`.

    A medium is not cut over devices: it is short, and of any number of places.
    """
    side = side_stack_config(config)
    whole = dataclasses.replace(sharder, rules=sharder.rules.without("sequence"))
    owners, init = tuple(range(num_layers)), weight_init(config, config.width)
    return Stack(side, owners, init, policy, whole, platform, config.remat, name="layers")


# ------------------------------------------------------------------------------
# The encoder of images: a vision transformer.


class ImagePrelude(nn.Module):
    """Patches, linear, plus a learned vector per row and one per column of patches, then layers
    that are not causal (ViT, arXiv 2010.11929). See `Prelude`."""

    config: ModelConfig
    policy: DTypePolicy
    sharder: Sharder
    platform: str

    @nn.compact
    def __call__(
        self,
        media: Float[Array, "N height width C"],
        lengths: Int[Array, "N"] | None,
        deterministic: bool,
    ) -> Encoded:
        """Encodes images; see `Prelude`."""
        image = self.config.image
        if media.shape[1:] != image.shape:
            raise ValueError(
                f"images have shape {media.shape[1:]}, but model.image says {image.shape} (height, "
                "width, channels); change either."
            )
        if lengths is not None:
            raise ValueError("lengths are given, but images have none; pass None.")
        patches = patchify(media, image.patch_size)
        embed = MediaEmbedding(self.config, self.policy, name="embedding")
        x = embed(patches, self._positions(), deterministic)
        is_patch = jnp.ones(x.shape[:2], bool)
        layers = media_stack(
            self.config, image.prelude_layers, self.policy, self.sharder, self.platform
        )
        return Encoded(layers(x, side_context(self.config, is_patch, deterministic)), is_patch)

    def _positions(self) -> Float[Array, "P D"]:
        image, width = self.config.image, self.config.width
        rows, columns = image.height // image.patch_size, image.width // image.patch_size
        init = weight_init(self.config, width).embedding
        axes = (None, "embed")
        of_rows = vector(self, "row_embedding", init, (rows, width), axes)
        of_columns = vector(self, "column_embedding", init, (columns, width), axes)
        return (of_rows[:, None] + of_columns).reshape(-1, width)


# ------------------------------------------------------------------------------
# The encoder of sound: convolutions over mel frames, then layers.


class AudioPrelude(nn.Module):
    """Strided convolutions, linear, plus a learned vector per position, then layers that are not
    causal. A clip of l frames takes ceil(l / downsampling) places. See `Prelude`."""

    config: ModelConfig
    policy: DTypePolicy
    sharder: Sharder
    platform: str

    @nn.compact
    def __call__(
        self,
        media: Float[Array, "N F M"],
        lengths: Int[Array, "N"] | None,
        deterministic: bool,
    ) -> Encoded:
        """Encodes clips; see `Prelude`. F is at most `max_frames`."""
        audio = self.config.audio
        if lengths is None:
            raise ValueError("lengths are None, but clips need them; pass the frames of each.")
        if media.shape[-1] != audio.mel.num_mels or media.shape[1] > audio.max_frames:
            raise ValueError(
                f"spectrograms have {media.shape[1]} frames of {media.shape[-1]} bins, but "
                f"model.audio allows {audio.max_frames} frames (max_frames) and has "
                f"{audio.mel.num_mels} bins (mel.num_mels); change either."
            )
        width = self.config.width
        num_halvings = audio.downsampling.bit_length() - 1
        downsample = ConvDownsampling(width, num_halvings, self.policy, name="downsampling")
        frames, lengths = downsample(media, lengths)
        is_place = frame_mask(lengths, frames.shape[1])
        init = weight_init(self.config, width).embedding
        shape, axes = (audio.num_tokens, width), (None, "embed")
        positions = vector(self, "position_embedding", init, shape, axes)[: frames.shape[1]]
        embed = MediaEmbedding(self.config, self.policy, name="embedding")
        x = embed(frames, positions, deterministic)
        layers = media_stack(
            self.config, audio.prelude_layers, self.policy, self.sharder, self.platform
        )
        x = layers(x, side_context(self.config, is_place, deterministic))
        return Encoded(jnp.where(is_place[..., None], x, 0), is_place)


# ------------------------------------------------------------------------------
# Encoding only the slots that are in use.
#
# How many there are is data, and shapes are not. So the slots in use are put in front, and the
# encoder runs over groups of them in a loop that skips the groups behind: one program for every
# count, and the time is that of the count rounded up to a group. On a mesh each device sorts the
# slots that it holds and nothing moves; a group is skipped once all devices are done.

# At most so many groups, and none of fewer slots than that (on each device).
MAX_GROUPS, MIN_GROUP = 8, 8

# (media [n, ...], lengths [n] or None, number of the group) -> embeddings [n, P, D]
EncodeGroup = Callable[[jax.Array, jax.Array | None, jax.Array], jax.Array]


def encode_used(
    encode: EncodeGroup,
    media: Float[Array, "N ..."],
    lengths: Int[Array, "N"] | None,
    is_used: Bool[Array, "N"],
    sharder: Sharder,
) -> Float[Array, "N P D"]:
    """Embeddings of the slots in use; those of the others are not defined, but finite.

    Args:
      encode: encodes each medium by itself, see `Prelude`; pure.
      media: the slots of a batch.
      lengths: frames of clips; None for images.
      is_used: which slots hold a medium.
      sharder: says over how many devices the slots are cut.
    """
    num_slots, ways = media.shape[0], sharder.ways("batch")
    if num_slots == 0 or num_slots % ways:
        ways = 1
    here = num_slots // ways
    size = min(max(MIN_GROUP, -(-here // MAX_GROUPS)), here)
    num_groups = -(-here // size)
    order = jnp.argsort(~is_used.reshape(ways, here), axis=1, stable=True)
    most = jnp.max(jnp.sum(is_used.reshape(ways, here), axis=1))
    padded = jnp.pad(order, ((0, 0), (0, num_groups * size - here)), mode="edge")
    groups = padded.reshape(ways, num_groups, size).swapaxes(0, 1)

    def take(slots: jax.Array, group: jax.Array) -> jax.Array:
        """Of [N, ...] those of one group, [ways * size, ...]."""
        by_device = slots.reshape(ways, here, *slots.shape[1:])
        index = group.reshape(ways, size, *(1 for _ in slots.shape[1:]))
        taken = jnp.take_along_axis(by_device, index, axis=1)
        taken = taken.reshape(ways * size, *slots.shape[1:])
        return sharder.constrain(taken, "batch", *(None,) * (taken.ndim - 1))

    def run(group: jax.Array, number: jax.Array) -> jax.Array:
        own = None if lengths is None else take(lengths, group)
        return encode(take(media, group), own, number)

    def visit(_: None, numbered: tuple[jax.Array, jax.Array]) -> tuple[None, jax.Array]:
        group, number = numbered
        made = jax.eval_shape(run, group, number)
        return None, jax.lax.cond(
            number * size < most,
            lambda: run(group, number),
            lambda: jnp.zeros(made.shape, made.dtype),
        )

    _, encoded = jax.lax.scan(visit, None, (groups, jnp.arange(num_groups)))
    encoded = encoded.reshape(num_groups, ways, size, *encoded.shape[2:]).swapaxes(0, 1)
    encoded = encoded.reshape(ways, num_groups * size, *encoded.shape[3:])
    back = jnp.argsort(order, axis=1)[:, :, None, None]
    return jnp.take_along_axis(encoded, back, axis=1).reshape(num_slots, *encoded.shape[2:])


# ------------------------------------------------------------------------------
# The encoders of a config.


def build_image_prelude(
    config: ModelConfig, policy: DTypePolicy, sharder: Sharder, platform: str
) -> Prelude:
    """The encoder of `config.image`. `platform` as in `build_model`."""
    return ImagePrelude(config, policy, sharder, platform)


def build_audio_prelude(
    config: ModelConfig, policy: DTypePolicy, sharder: Sharder, platform: str
) -> Prelude:
    """The encoder of `config.audio`. `platform` as in `build_model`."""
    return AudioPrelude(config, policy, sharder, platform)
