"""What images and sound add to a training step's loss."""

from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp

from megatransformer_jax.config.model import ModelConfig
from megatransformer_jax.models.megatransformer import MegaTransformer
from megatransformer_jax.types import Batch, MediaBatch, ModelOutput

# Order of `log_variances` in the model.
KINDS = ("text", "image", "audio")


class MediaCounts(NamedTuple):
    """Media of a whole batch, float32 []: in it, and of these what decoders learn to make."""

    images: jax.Array
    drawn_images: jax.Array
    clips: jax.Array
    spoken_clips: jax.Array


class MediaRoom(NamedTuple):
    """Most media of a batch that decoders learn to make; they compute no others."""

    images: int
    clips: int


class MediaTerm(NamedTuple):
    """A micro-batch's share.

    Attributes:
      images: share of the image decoder's mean loss, before any weight; None without images.
      clips: the same for sound.
      metrics: by name: image_loss, audio_loss, and their parts such as audio_duration.
    """

    images: jax.Array | None
    clips: jax.Array | None
    metrics: dict[str, jax.Array]


def count_media(media: MediaBatch) -> MediaCounts:
    """Counts of a batch or of a part of it."""

    def count(exists: jax.Array | None) -> jax.Array:
        return jnp.float32(0) if exists is None else jnp.sum(exists, dtype=jnp.float32)

    has_clip = None if media.mel_lengths is None else media.mel_lengths > 0
    return MediaCounts(
        count(media.is_image),
        count(None if media.is_image is None else media.is_image & media.is_drawn),
        count(has_clip),
        count(None if has_clip is None else has_clip & media.is_spoken),
    )


def media_term(
    model: MegaTransformer,
    params: Any,
    part: Batch,
    output: ModelOutput,
    counts: MediaCounts,
    room: MediaRoom,
    key: jax.Array,
) -> MediaTerm:
    """Losses of the media that the decoders learn to make, each divided by the count of the whole
    batch, so that micro-batches add up.

    Args:
      model: with parts for media.
      params: its parameters.
      part: a micro-batch with media.
      output: of the pass over it.
      counts: of the whole batch.
      room: of the whole batch. If there are more media to make than that, the term is NaN.
      key: of noise and time steps.
    """
    media = cast(MediaBatch, part.media)
    image_key, audio_key = jax.random.split(key)
    images = clips = None
    metrics: dict[str, jax.Array] = {}
    if model.config.image.enabled:
        is_drawn = (media.is_image & media.is_drawn).reshape(-1)
        flat = media.images.reshape(-1, *media.images.shape[2:])
        chosen, (flat, condition) = _first(
            model, is_drawn, room.images, (flat, output.conditions["image"])
        )
        terms: Any = model.apply(
            {"params": params}, flat, condition, image_key, method="image_loss"
        )
        means = _shares(terms, chosen, is_drawn, counts.drawn_images, "image")
        images, metrics = means["image_loss"], metrics | means
    if model.config.audio.enabled:
        lengths = media.mel_lengths.reshape(-1)
        is_spoken = (lengths > 0) & media.is_spoken.reshape(-1)
        flat = media.mels.reshape(-1, *media.mels.shape[2:])
        chosen, (flat, lengths, condition) = _first(
            model, is_spoken, room.clips, (flat, lengths, output.conditions["audio"])
        )
        terms = model.apply(
            {"params": params}, flat, lengths, condition, audio_key, method="audio_loss"
        )
        means = _shares(terms, chosen, is_spoken, counts.spoken_clips, "audio")
        clips, metrics = means["audio_loss"], metrics | means
    return MediaTerm(images, clips, metrics)


def weighted_losses(config: ModelConfig, term: MediaTerm) -> dict[str, jax.Array]:
    """Shares of media at the fixed weights, by 'image' and 'audio'; those that there are."""
    weighted = {}
    if term.images is not None:
        weighted["image"] = config.image.decoder.loss_weight * term.images
    if term.clips is not None:
        weighted["audio"] = config.audio.decoder.loss_weight * term.clips
    return weighted


def weigh_losses(
    config: ModelConfig,
    params: Any,
    text: jax.Array,
    term: MediaTerm,
    counts: MediaCounts,
    share: float,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The weighted sum of a micro-batch's shares, and metrics of learned weights.

    With `loss_weighting='learned'` a loss L counts as exp(-s) L + s. Where a batch has nothing of a
    kind its s is left out too, or it would fall without end.

    Args:
      config: of the model.
      params: of the model.
      text: share of the text's loss.
      term: shares of media.
      counts: of the whole batch.
      share: the micro-batch's share of the batch.

    Returns:
      The sum, and by name `loss_weight_text`, `_image`, `_audio`: exp(-s), each as a share.
    """
    losses = {"text": text, **weighted_losses(config, term)}
    if config.loss_weighting == "fixed":
        return sum(losses.values(), jnp.float32(0)), {}
    numbers = {"image": counts.drawn_images, "audio": counts.spoken_clips}
    total, metrics = jnp.float32(0), {}
    for name, loss in losses.items():
        log_variance = params["media"]["log_variances"][KINDS.index(name)]
        weight = jnp.exp(-log_variance)
        is_there = jnp.sign(numbers[name]) if name in numbers else 1.0
        total = total + weight * loss + is_there * share * log_variance
        metrics[f"loss_weight_{name}"] = share * weight
    return total, metrics


def _first(
    model: MegaTransformer, counts_in: jax.Array, room: int, arrays: Any
) -> tuple[jax.Array, Any]:
    """Those that count, in front and padded with others to `room`: which they are, and their
    arrays.

    Decoders are dear, and most slots of a mixed batch hold media to read, or none.
    """
    ways = model.sharder.ways("batch")
    size = min(-(-room // ways) * ways, counts_in.shape[0])
    order = jnp.argsort(~counts_in, stable=True)[:size]

    def take(array: jax.Array) -> jax.Array:
        return model.sharder.constrain(array[order], "batch", *(None,) * (array.ndim - 1))

    return counts_in[order], jax.tree.map(take, arrays)


def _shares(
    terms: dict[str, jax.Array],
    chosen: jax.Array,
    counts_in: jax.Array,
    num_media: jax.Array,
    kind: str,
) -> dict[str, jax.Array]:
    """Means over the media of the batch, as far as this part has them; NaN if some had no room."""
    all_fit = jnp.sum(chosen) == jnp.sum(counts_in)
    return {
        f"{kind}_{name}": jnp.where(all_fit, jnp.sum(jnp.where(chosen, values, 0)), jnp.nan)
        / jnp.maximum(num_media, 1)
        for name, values in terms.items()
    }
