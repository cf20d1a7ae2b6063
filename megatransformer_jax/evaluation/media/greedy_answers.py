"""Greedy answers to media: captions and transcripts, without a cache.

Every new token takes a pass over the whole batch. Answers are short, and the passes are those that
validation has compiled already, or would.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Key

from megatransformer_jax.evaluation.media.media_eval_step import is_after_media, run_model
from megatransformer_jax.models.megatransformer import MegaTransformer
from megatransformer_jax.types import Batch

NextTokens = Callable[[Any, Batch, Any], Int[Array, "B T"]]


def make_next_tokens(model: MegaTransformer, key: Key[Array, ""]) -> NextTokens:
    """Builds (params, batch, num_steps) -> the most likely next token at every position.

    Args:
      model: with parts for media.
      key: of the core's first states.
    """

    def next_tokens(params: Any, batch: Batch, num_steps: Any) -> Int[Array, "B T"]:
        logits = run_model(model, params, batch, num_steps, key).logits
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)

    return next_tokens


def rows_of_task(batches: Sequence[Batch], task: int) -> list[Batch]:
    """The rows of one task, in batches of the size of the first; the last repeats its last row.

    Args:
      batches: on the host, with media.
      task: its number.
    """
    size = len(batches[0].tokens)
    rows: Batch = jax.tree.map(lambda *arrays: np.concatenate(arrays), *batches)
    is_there = rows.segment_ids.any(axis=1) & (rows.media.task == task)  # type: ignore[union-attr]
    numbers = np.flatnonzero(is_there)
    parts = [numbers[first : first + size] for first in range(0, len(numbers), size)]
    filled = [np.pad(part, (0, size - len(part)), mode="edge") for part in parts]
    return [jax.tree.map(lambda array, of=of: array[of], rows) for of in filled]


def right_answers(batch: Batch, end_id: int) -> list[list[int]]:
    """The text after the last medium of each row, without the end token."""
    is_answer = np.asarray(is_after_media(jnp.asarray(batch.media.follows)))  # type: ignore[union-attr]
    counts = is_answer & (np.asarray(batch.loss_mask) > 0)
    targets = np.asarray(batch.targets)
    return [
        [int(token) for token in row[places] if token != end_id]
        for row, places in zip(targets, counts, strict=True)
    ]


def greedy_answers(
    next_tokens: NextTokens, params: Any, batch: Batch, num_steps: Any, end_id: int
) -> list[list[int]]:
    """What the model says after the last medium of each row, up to the end token or the row's end.

    Args:
      next_tokens: compiled.
      params: the model's.
      batch: on the host; text after the last medium is not looked at.
      num_steps: iterations of the core, int32 [].
      end_id: ends an answer.

    Returns:
      Token ids of each row; none for a row without a medium.
    """
    is_answer = np.asarray(is_after_media(jnp.asarray(batch.media.follows)))  # type: ignore[union-attr]
    num_tokens = is_answer.shape[1]
    # The closing token is the first behind the medium, and predicts the answer's first token.
    closing = np.where(is_answer.any(axis=1), is_answer.argmax(axis=1), num_tokens)
    tokens = np.array(batch.tokens)
    # Rows may grow to their full length; positions before a token do not see it.
    segment_ids = np.where(closing[:, None] < num_tokens, 1, batch.segment_ids).astype(np.int32)
    answers: list[list[int]] = [[] for _ in tokens]
    is_open = closing < num_tokens
    device = jax.local_devices()[0]
    for place in range(int(closing.min()), num_tokens):
        now = batch._replace(tokens=tokens.copy(), segment_ids=segment_ids)
        predicted = np.asarray(next_tokens(params, jax.device_put(now, device), num_steps))
        for row in np.flatnonzero(is_open & (closing <= place)):
            token = int(predicted[row, place])
            if token == end_id:
                is_open[row] = False
                continue
            answers[row].append(token)
            if place + 1 < num_tokens:
                tokens[row, place + 1] = token
        if not is_open.any():
            break
    return answers
