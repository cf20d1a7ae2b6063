"""Scores a fixed set of batches, during training and at any depth."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from flax import linen as nn
from jaxtyping import Array, Float, Int, Key

from megatransformer_jax.config.option import UserError
from megatransformer_jax.losses.tokens import token_loss
from megatransformer_jax.models.gate_readout import GateReadout
from megatransformer_jax.types import Batch

# ------------------------------------------------------------------------------
# Scores one batch at one depth.


class EvalSums(NamedTuple):
    """Sums over a batch; batches add up field by field."""

    cross_entropy: Float[Array, ""]  # nats, over the tokens that count
    tokens: Float[Array, ""]  # tokens that count
    correct: Float[Array, ""]  # of these, predicted right
    exact_rows: Float[Array, ""]  # rows with all their tokens right
    rows: Float[Array, ""]  # rows with any token that counts


EvalStep = Callable[[Any, Batch, Any], tuple[EvalSums, Int[Array, "B T"]]]


def make_eval_step(
    model: nn.Module, key: Key[Array, ""], readout: GateReadout | None = None, *, votes: int = 1
) -> EvalStep:
    """Builds (params, batch, num_steps) -> (sums, predictions); jit it once for all depths.

    `num_steps`, int32 [], is traced. Nothing is random: the thought state's first value comes from
    the same `key` for every batch and depth.

    Args:
      model: called like `MegaTransformer`.
      key: for the rng stream 'state'.
      readout: what is scored of the iterations. None: the last one's output.
      votes: passes over each batch, from other first states; the first is that of one pass. At each
        position most of them decide, the more probable token if they are equal. The loss is that
        of their mean probabilities.
    """
    # Not named if there is none, as other modules than ours do not know it.
    reading: dict[str, Any] = {} if readout is None else {"readout": readout}

    def logits_from(params: Any, batch: Batch, num_steps: Any, key: Key[Array, ""]) -> jax.Array:
        output: Any = model.apply(
            {"params": params},
            batch.tokens,
            positions=batch.positions,
            segment_ids=batch.segment_ids,
            num_steps=num_steps,
            backprop_depth=0,
            deterministic=True,
            rngs={"state": key},
            media=batch.media,
            **reading,
        )
        return cast(jax.Array, output.logits)

    def eval_step(params: Any, batch: Batch, num_steps: Any) -> tuple[EvalSums, Int[Array, "B T"]]:
        first = logits_from(params, batch, num_steps, key)
        if votes == 1:
            return score_sums(first, batch)

        def add(sums: Any, vote: jax.Array) -> tuple[Any, None]:
            logits = logits_from(params, batch, num_steps, jax.random.fold_in(key, vote))
            return jax.tree.map(jnp.add, sums, _vote(logits)), None

        (probs, counts), _ = jax.lax.scan(add, _vote(first), jnp.arange(1, votes))
        mean = probs / votes
        # Half of a probability decides between equal counts alone.
        predictions = jnp.argmax(counts + 0.5 * mean, axis=-1).astype(jnp.int32)
        return score_sums(jnp.log(mean), batch, predictions)

    return eval_step


def _vote(logits: Float[Array, "B T V"]) -> tuple[Float[Array, "B T V"], Float[Array, "B T V"]]:
    """Probabilities, and 1 at the likeliest token."""
    size = logits.shape[-1]
    return jax.nn.softmax(logits), jax.nn.one_hot(jnp.argmax(logits, axis=-1), size)


def score_sums(
    logits: Float[Array, "B T V"], batch: Batch, predictions: Int[Array, "B T"] | None = None
) -> tuple[EvalSums, Int[Array, "B T"]]:
    """What the scores of a batch add up to, and the predictions. None: the most likely tokens."""
    totals = token_loss(logits, batch.targets, batch.loss_mask)
    if predictions is None:
        predictions = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    counts = batch.loss_mask > 0
    has_tokens = jnp.any(counts, axis=-1)
    is_exact = jnp.all((predictions == batch.targets) | ~counts, axis=-1) & has_tokens
    sums = EvalSums(
        cross_entropy=totals.cross_entropy,
        tokens=totals.tokens,
        correct=jnp.sum((predictions == batch.targets) * batch.loss_mask),
        exact_rows=jnp.sum(is_exact, dtype=jnp.float32),
        rows=jnp.sum(has_tokens, dtype=jnp.float32),
    )
    return sums, predictions


# ------------------------------------------------------------------------------
# A validation set.


@dataclasses.dataclass(frozen=True)
class Scores:
    """Means over a set of batches.

    Attributes:
      depth: iterations of the core, or None for a model without one.
      loss: cross-entropy per token in nats.
      perplexity: exp(loss).
      accuracy: share of tokens predicted right.
      exact_accuracy: share of rows with all their tokens right (the answer of a problem).
      tokens: how many counted.
    """

    depth: int | None
    loss: float
    perplexity: float
    accuracy: float
    exact_accuracy: float
    tokens: int


class ValidationSet:
    """Batches that are scored again and again, so that losses compare between steps and depths.

    Args:
      batches: global batches on the mesh.
      eval_step: compiled; see `make_eval_step`.

    Raises:
      ValueError: if there is no batch.
    """

    def __init__(self, batches: Sequence[Batch], eval_step: EvalStep):
        if not batches:
            raise ValueError("a validation set needs at least one batch")
        self.batches = tuple(batches)
        self.eval_step = eval_step

    def score(self, params: Any, depth: int | None) -> Scores:
        """Scores the whole set at one depth. The result is the same on every process."""
        num_steps = depth_argument(depth)
        # Dispatched one after another and fetched together, so the device does not wait.
        sums = [self.eval_step(params, batch, num_steps)[0] for batch in self.batches]
        return mean_scores(depth, jax.device_get(sums))


def depth_argument(depth: int | None) -> jax.Array:
    """The traced argument for a depth; a model without a core ignores its value."""
    return jax.device_put(np.int32(1 if depth is None else depth))


def mean_scores(depth: int | None, sums: Iterable[Sequence[Any]]) -> Scores:
    """Adds batches (`EvalSums`) up in float64 and divides.

    Raises:
      UserError: if no token counts.
    """
    rows = np.array([[float(value) for value in one] for one in sums], np.float64)
    totals = EvalSums(*rows.sum(axis=0))
    if totals.tokens == 0:
        raise UserError("no token of the validation batches counts in the loss; check the data.")
    loss = float(totals.cross_entropy / totals.tokens)
    return Scores(
        depth=depth,
        loss=loss,
        perplexity=math.exp(loss) if loss < 700 else math.inf,
        accuracy=float(totals.correct / totals.tokens),
        exact_accuracy=float(totals.exact_rows / totals.rows),
        tokens=int(totals.tokens),
    )


# What is shown of `Scores`. Only of problems is a row ever predicted right as a whole.
TEXT_SCORES = ("loss", "perplexity", "accuracy")
PROBLEM_SCORES = (*TEXT_SCORES, "exact_accuracy")


def scores_by_name(scores: Scores, names: Sequence[str]) -> dict[str, float]:
    """Those of the scores that have one of the names."""
    return {name: getattr(scores, name) for name in names}


# ------------------------------------------------------------------------------
# The hook that validates during training, whatever is scored.


class ScoreHook:
    """Scores the parameters every so many steps, as validation/<name> (a `Hook` of the loop).

    Args:
      every_steps: steps between validations; the last step is validated too.
      score: from parameters to numbers by name, the same on every process.
      params_of: from the train state to the parameters that are scored.
    """

    at_end = True
    at_stop = False
    skips_bad_steps = False

    def __init__(
        self,
        every_steps: int,
        score: Callable[[Any], Mapping[str, float]],
        params_of: Callable[[Any], Any],
    ):
        self.every_steps = every_steps
        self._score = score
        self._params_of = params_of

    def __call__(self, step: int, state: Any, scalars: Mapping[str, float]) -> dict[str, float]:
        """Scores, logs and returns the numbers."""
        scores = self._score(self._params_of(state))
        shown = "  ".join(f"{_shown_name(name)} {value:.4f}" for name, value in scores.items())
        logging.info("validation after step %d: %s", step, shown)
        return {f"validation/{name}": value for name, value in scores.items()}


def _shown_name(name: str) -> str:
    return {"accuracy": "token accuracy", "exact_accuracy": "exact answers"}.get(name, name)


# ------------------------------------------------------------------------------
# Validation of a model whose scores are means over rows, such as a vocoder's losses.

# From (params, batch) to scalars by name, means over the rows of the batch.
Judge = Callable[[Any, Any], Mapping[str, jax.Array]]


class MeanValidation:
    """Held-out batches and what they are judged by.

    Args:
      batches: on the mesh.
      rows: of each batch that count, the weights of the batches' means.
      judge: compiled.

    Raises:
      ValueError: if there is no batch, or no row counts.
    """

    def __init__(self, batches: Sequence[Any], rows: Sequence[int], judge: Judge):
        if len(batches) != len(rows) or sum(rows) <= 0:
            raise ValueError(f"{len(batches)} batches with {list(rows)} rows; at least one counts")
        self.batches = tuple(batches)
        self._weights = np.array(rows, np.float64) / sum(rows)
        self._judge = judge

    def score(self, params: Any) -> dict[str, float]:
        """Means over all rows, by name; the same on every process."""
        scores = jax.device_get([self._judge(params, batch) for batch in self.batches])
        return {
            name: float(np.dot(self._weights, [float(score[name]) for score in scores]))
            for name in scores[0]
        }
