"""Shows problems of a batch with the model's answers, at several depths."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from megatransformer_jax.evaluation.eval_step import EvalStep
from megatransformer_jax.evaluation.validation import depth_argument
from megatransformer_jax.types import Batch


def answer_samples(
    params: Any,
    eval_step: EvalStep,
    batch: Batch,
    depths: Sequence[int | None],
    decode: Callable[[Sequence[int]], str],
    *,
    count: int,
) -> list[str]:
    """The first `count` problems: the text, the wanted answer, and the answer at each depth.

    An answer is what the model predicts at the positions that count, given the right tokens before
    each of them, which is how exact-answer accuracy is measured.

    Args:
      params: the model's parameters.
      eval_step: compiled; see `make_eval_step`.
      batch: a batch on the mesh; its first rows must be on this process.
      depths: which depths answer.
      decode: from token ids to text.
      count: how many problems.
    """
    predictions = {
        depth: _first_rows(eval_step(params, batch, depth_argument(depth))[1], count)
        for depth in depths
    }
    tokens, targets, loss_mask, segments = (
        _first_rows(array, count)
        for array in (batch.tokens, batch.targets, batch.loss_mask, batch.segment_ids)
    )
    texts = []
    for row in range(len(tokens)):
        counts = loss_mask[row] > 0
        lines = [
            decode(tokens[row][segments[row] > 0].tolist()),
            f"  wanted: {decode(targets[row][counts].tolist())}",
        ]
        for depth, predicted in predictions.items():
            is_right = np.array_equal(predicted[row][counts], targets[row][counts])
            name = "model" if depth is None else f"depth {depth}"
            answer = decode(predicted[row][counts].tolist())
            lines.append(f"  {name}: {answer}  [{'right' if is_right else 'wrong'}]")
        texts.append("\n".join(lines))
    return texts


def _first_rows(array: jax.Array, count: int) -> np.ndarray:
    """The first rows that this process holds."""
    first = min(array.addressable_shards, key=lambda shard: shard.index[0].start or 0)
    if array.is_fully_addressable:
        return np.asarray(jax.device_get(array))[:count]
    return np.asarray(jax.device_get(first.data))[:count]
