"""Scores a fixed set of batches with media, during training and after it."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from absl import logging

from megatransformer_jax.config.option import UserError
from megatransformer_jax.evaluation.media.media_eval_step import MediaEvalStep, MediaSums
from megatransformer_jax.evaluation.validation import depth_argument
from megatransformer_jax.types import Batch

# Tasks whose answer is a text that is right or wrong as a whole, and what its accuracy is called.
ANSWER_METRICS = {"caption": "caption_accuracy", "transcribe": "transcription_accuracy"}


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
        <task>_token_accuracy; caption_accuracy and transcription_accuracy, which count whole
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


class MediaValidationHook:
    """Scores the validation set at the trained mean depth (a `Hook` of the training loop).

    Takes the place of `ValidationHook` in runs with media.

    Args:
      every_steps: steps between validations; the last step is validated too.
      validation_set: what is scored.
      depth: iterations of the core, or None for a model without one.
      params_of: from the train state to the parameters that are scored.
    """

    at_end = True
    at_stop = False
    skips_bad_steps = False

    def __init__(
        self,
        every_steps: int,
        validation_set: MediaValidationSet,
        depth: int | None,
        params_of: Callable[[Any], Any],
    ):
        self.every_steps = every_steps
        self._set = validation_set
        self._depth = depth
        self._params_of = params_of

    def __call__(self, step: int, state: Any, scalars: Mapping[str, float]) -> dict[str, float]:
        """Returns `MediaScores.metrics` as validation/<name>."""
        metrics = self._set.score(self._params_of(state), self._depth).metrics()
        words = "  ".join(f"{name} {value:.4f}" for name, value in metrics.items())
        logging.info("validation after step %d: %s", step, words)
        return {f"validation/{name}": value for name, value in metrics.items()}
