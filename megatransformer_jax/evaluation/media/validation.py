"""Scores a fixed set of batches with media, during training and after it."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from megatransformer_jax import streams
from megatransformer_jax.config.option import UserError
from megatransformer_jax.evaluation.validation import depth_argument
from megatransformer_jax.losses.tokens import token_cross_entropy
from megatransformer_jax.models.megatransformer import MegaTransformer
from megatransformer_jax.types import NO_MEDIUM, Batch, MediaBatch, ModelOutput

# ------------------------------------------------------------------------------
# Scores one batch of text, images and sound at one depth.


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


def is_answer(follows: Int[Array, "B T"], loss_mask: Float[Array, "B T"]) -> Bool[Array, "B T"]:
    """Positions behind the row's last opening token, from the first that counts in the loss on, as
    given text such as a question does not; none in a row without media."""
    is_opening = follows != NO_MEDIUM
    later = jnp.cumsum(is_opening[:, ::-1], axis=1)[:, ::-1]
    is_behind = (later == 0) & jnp.any(is_opening, axis=1, keepdims=True)
    return is_behind & (jnp.cumsum(is_behind & (loss_mask > 0), axis=1) > 0)


def _task_sums(logits: jax.Array, batch: Batch, media: MediaBatch, num_tasks: int) -> TaskSums:
    counts = batch.loss_mask > 0
    is_right = jnp.argmax(logits, axis=-1) == batch.targets
    is_asked = counts & is_answer(media.follows, batch.loss_mask)
    has_answer = jnp.any(is_asked, axis=1)
    is_exact = has_answer & jnp.all(is_right | ~is_asked, axis=1)
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
        jax.random.fold_in(key, streams.VALIDATED_IMAGES),
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
        jax.random.fold_in(key, streams.VALIDATED_CLIPS),
        method="audio_loss",
    )
    return _sums(terms, (lengths > 0) & media.is_spoken.reshape(-1))


def _sums(terms: Any, counts_in: jax.Array) -> tuple[dict[str, jax.Array], jax.Array]:
    sums = {name: jnp.sum(jnp.where(counts_in, values, 0)) for name, values in terms.items()}
    return sums, jnp.sum(counts_in, dtype=jnp.float32)


# ------------------------------------------------------------------------------
# A validation set.

# Tasks whose answer is a text that is right or wrong as a whole, and what its accuracy is called.
ANSWER_METRICS = {
    "caption": "caption_accuracy",
    "transcribe": "transcription_accuracy",
    "which": "which_accuracy",
    "which_clip": "which_clip_accuracy",
    "fewshot": "fewshot_accuracy",
    "documents": "documents_accuracy",
}


@dataclasses.dataclass(frozen=True)
class TaskScores:
    """Means over the text of one task's rows.

    Attributes:
      loss: cross-entropy per token in nats.
      token_accuracy: share of tokens predicted right, given the right ones before.
      exact_accuracy: share of rows whose text after the last medium is predicted right as a whole;
        None if the task has no such text.
      tokens: how many counted.
    """

    loss: float
    token_accuracy: float
    exact_accuracy: float | None
    tokens: int


@dataclasses.dataclass(frozen=True)
class MediaScores:
    """Means over a set of batches.

    Attributes:
      depth: iterations of the core, or None for a model without one.
      loss: cross-entropy per token of all text, in nats.
      perplexity: exp(loss).
      accuracy: share of text tokens predicted right.
      tasks: of each task that has rows, by its name.
      image_terms: the image decoder's loss and its parts, means over images to draw; empty if there
        were none.
      audio_terms: the same of clips.
    """

    depth: int | None
    loss: float
    perplexity: float
    accuracy: float
    tasks: dict[str, TaskScores]
    image_terms: dict[str, float]
    audio_terms: dict[str, float]

    def metrics(self) -> dict[str, float]:
        """Numbers by name: loss, perplexity, accuracy; <task>_text_loss and
        <task>_token_accuracy; those of `ANSWER_METRICS`, which count whole
        answers; image_loss, audio_loss and parts such as audio_duration."""
        named = {"loss": self.loss, "perplexity": self.perplexity, "accuracy": self.accuracy}
        for name, scores in self.tasks.items():
            named[f"{name}_text_loss"] = scores.loss
            named[f"{name}_token_accuracy"] = scores.token_accuracy
            if name in ANSWER_METRICS and scores.exact_accuracy is not None:
                named[ANSWER_METRICS[name]] = scores.exact_accuracy
        named |= {f"image_{name}": value for name, value in self.image_terms.items()}
        return named | {f"audio_{name}": value for name, value in self.audio_terms.items()}


class MediaValidationSet:
    """Batches that are scored again and again, so that losses compare between steps and depths.

    Args:
      batches: global batches on the mesh, with media.
      eval_step: compiled; see `make_media_eval_step`.
      task_names: by number of the task.

    Raises:
      ValueError: if there is no batch.
    """

    def __init__(
        self, batches: Sequence[Batch], eval_step: MediaEvalStep, task_names: Sequence[str]
    ):
        if not batches:
            raise ValueError("a validation set needs at least one batch")
        self.batches = tuple(batches)
        self._eval_step = eval_step
        self._task_names = tuple(task_names)

    def score(self, params: Any, depth: int | None) -> MediaScores:
        """Scores the whole set at one depth. The result is the same on every process."""
        num_steps = depth_argument(depth)
        # Dispatched one after another and fetched together, so the device does not wait.
        sums = [self._eval_step(params, batch, num_steps) for batch in self.batches]
        return mean_media_scores(depth, jax.device_get(sums), self._task_names)


def mean_media_scores(
    depth: int | None, sums: Iterable[MediaSums], task_names: Sequence[str]
) -> MediaScores:
    """Adds batches up in float64 and divides.

    Raises:
      UserError: if no text token counts.
    """
    added: MediaSums = jax.tree.map(
        lambda *values: np.sum(np.array(values, np.float64), axis=0), *sums
    )
    totals, tokens = added.tasks, added.tasks.tokens.sum()
    if not tokens:
        raise UserError("no token of the validation batches counts in the loss; check the data.")
    tasks = {}
    for number, name in enumerate(task_names):
        if not totals.tokens[number]:
            continue
        answers = totals.answers[number]
        tasks[name] = TaskScores(
            loss=float(totals.cross_entropy[number] / totals.tokens[number]),
            token_accuracy=float(totals.correct[number] / totals.tokens[number]),
            exact_accuracy=float(totals.exact_answers[number] / answers) if answers else None,
            tokens=int(totals.tokens[number]),
        )
    loss = float(totals.cross_entropy.sum() / tokens)
    return MediaScores(
        depth=depth,
        loss=loss,
        perplexity=math.exp(loss) if loss < 700 else math.inf,
        accuracy=float(totals.correct.sum() / tokens),
        tasks=tasks,
        image_terms=_means(added.images, added.drawn_images),
        audio_terms=_means(added.clips, added.spoken_clips),
    )


def _means(terms: Mapping[str, Any], count: Any) -> dict[str, float]:
    return {name: float(value / count) for name, value in terms.items()} if count else {}
