"""Greedy answers to media: captions and transcripts, without a cache.

Every new token takes a pass over the whole batch. Answers are short, and the passes are those that
validation has compiled already, or would.
"""

from collections.abc import Callable
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
