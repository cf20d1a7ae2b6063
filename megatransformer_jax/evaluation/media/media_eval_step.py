"""Scores one batch of text, images and sound at one depth."""

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from megatransformer_jax.losses.tokens import token_cross_entropy
from megatransformer_jax.models.megatransformer import MegaTransformer
from megatransformer_jax.types import NO_MEDIUM, Batch, MediaBatch, ModelOutput

# Keep the decoders' draws apart from the first state's.
_IMAGE_STREAM, _AUDIO_STREAM = 1, 2


class TaskSums(NamedTuple):
    """Sums over the rows of each task, float32 [tasks].

    Attributes:
      cross_entropy: nats, over the text tokens that count.
      tokens: how many count.
      correct: of these, predicted right.
      answers: rows with text after their last medium.
      exact_answers: of these, all that text predicted right.
    """

    cross_entropy: Float[Array, "tasks"]
    tokens: Float[Array, "tasks"]
    correct: Float[Array, "tasks"]
    answers: Float[Array, "tasks"]
    exact_answers: Float[Array, "tasks"]


class MediaSums(NamedTuple):
    """Sums over a batch; batches add up leaf by leaf.

    Attributes:
      tasks: of the text.
      images: the image decoder's loss terms by name, over the images it learns to draw.
      drawn_images: how many these are.
      clips: the audio decoder's loss terms by name, over the clips it learns to make.
      spoken_clips: how many these are.
    """

    tasks: TaskSums
    images: dict[str, Float[Array, ""]]
    drawn_images: Float[Array, ""]
    clips: dict[str, Float[Array, ""]]
    spoken_clips: Float[Array, ""]


MediaEvalStep = Callable[[Any, Batch, Any], MediaSums]


def make_media_eval_step(
    model: MegaTransformer, key: Key[Array, ""], num_tasks: int
) -> MediaEvalStep:
    """Builds (params, batch, num_steps) -> sums; jit it once for all depths.

    Text is predicted from the right text before it. All of an answer is predicted right in this way
    exactly if greedy generation gives it. Noise and time steps of the decoders come from the same
    `key` for every batch, step and depth, so that their losses compare.

    Args:
      model: with parts for media.
      key: of the core's first states and of the decoders' noise.
      num_tasks: the batches' `media.task` counts from 0 to below this.
    """

    def media_eval_step(params: Any, batch: Batch, num_steps: Any) -> MediaSums:
        output = run_model(model, params, batch, num_steps, key)
        media = cast(MediaBatch, batch.media)
        images, drawn = _image_terms(model, params, media, output, key)
        clips, spoken = _audio_terms(model, params, media, output, key)
        return MediaSums(
            _task_sums(output.logits, batch, media, num_tasks), images, drawn, clips, spoken
        )

    return media_eval_step


def run_model(
    model: MegaTransformer, params: Any, batch: Batch, num_steps: Any, key: Key[Array, ""]
) -> ModelOutput:
    """A pass over a batch with media, without dropout or gradients."""
    output = model.apply(
        {"params": params},
        batch.tokens,
        segment_ids=batch.segment_ids,
        media=batch.media,
        num_steps=num_steps,
        backprop_depth=0,
        deterministic=True,
        rngs={"state": key},
    )
    return cast(ModelOutput, output)


def is_after_media(follows: Int[Array, "B T"]) -> Bool[Array, "B T"]:
    """Positions behind the row's last opening token; none in a row without media."""
    is_opening = follows != NO_MEDIUM
    later = jnp.cumsum(is_opening[:, ::-1], axis=1)[:, ::-1]
    return (later == 0) & jnp.any(is_opening, axis=1, keepdims=True)


def _task_sums(logits: jax.Array, batch: Batch, media: MediaBatch, num_tasks: int) -> TaskSums:
    counts = batch.loss_mask > 0
    is_right = jnp.argmax(logits, axis=-1) == batch.targets
    is_answer = counts & is_after_media(media.follows)
    has_answer = jnp.any(is_answer, axis=1)
    is_exact = has_answer & jnp.all(is_right | ~is_answer, axis=1)
    loss = token_cross_entropy(logits, batch.targets) * batch.loss_mask
    is_of_task = jax.nn.one_hot(media.task, num_tasks, dtype=jnp.float32)

    def by_task(rows: jax.Array) -> jax.Array:
        return rows.astype(jnp.float32) @ is_of_task

    return TaskSums(
        cross_entropy=by_task(loss.sum(axis=1)),
        tokens=by_task(batch.loss_mask.sum(axis=1)),
        correct=by_task((is_right * batch.loss_mask).sum(axis=1)),
        answers=by_task(has_answer),
        exact_answers=by_task(is_exact),
    )


def _image_terms(
    model: MegaTransformer, params: Any, media: MediaBatch, output: ModelOutput, key: jax.Array
) -> tuple[dict[str, jax.Array], jax.Array]:
    if not model.config.image.enabled:
        return {}, jnp.float32(0)
    terms = model.apply(
        {"params": params},
        media.images.reshape(-1, *media.images.shape[2:]),
        output.conditions["image"],
        jax.random.fold_in(key, _IMAGE_STREAM),
        method="image_loss",
    )
    return _sums(terms, (media.is_image & media.is_drawn).reshape(-1))


def _audio_terms(
    model: MegaTransformer, params: Any, media: MediaBatch, output: ModelOutput, key: jax.Array
) -> tuple[dict[str, jax.Array], jax.Array]:
    if not model.config.audio.enabled:
        return {}, jnp.float32(0)
    lengths = media.mel_lengths.reshape(-1)
    terms = model.apply(
        {"params": params},
        media.mels.reshape(-1, *media.mels.shape[2:]),
        lengths,
        output.conditions["audio"],
        jax.random.fold_in(key, _AUDIO_STREAM),
        method="audio_loss",
    )
    return _sums(terms, (lengths > 0) & media.is_spoken.reshape(-1))


def _sums(terms: Any, counts_in: jax.Array) -> tuple[dict[str, jax.Array], jax.Array]:
    sums = {name: jnp.sum(jnp.where(counts_in, values, 0)) for name, values in terms.items()}
    return sums, jnp.sum(counts_in, dtype=jnp.float32)
