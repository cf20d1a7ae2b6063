"""Answers to generated problems: shown at several depths, and scored as generation gives them."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Int, Key

from megatransformer_jax.evaluation.validation import EvalStep, depth_argument
from megatransformer_jax.models.exit_criteria import DepthRule
from megatransformer_jax.models.megatransformer import MegaTransformer
from megatransformer_jax.models.passes.cached import CachedOutput, NewTokens, cached_forward
from megatransformer_jax.nn.kv_cache import KVCache
from megatransformer_jax.types import Batch

# ------------------------------------------------------------------------------
# Problems of a batch with the model's answers.


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


# ------------------------------------------------------------------------------
# Scores answers to problems as generation would give them: token by token, with a cache.
#
# `eval_step` runs all tokens side by side at one depth. Here a token reads what the cache kept of
# the tokens before it, so what exits, few slots or a warm start do to accuracy can be measured.
#
# A problem's tokens are given, and the right answer so far with them. Feeding predictions back
# instead would give the same exact-answer accuracy: up to the first wrong prediction both are the
# same, and a wrong one makes the answer wrong whatever follows.


@struct.dataclass
class CachedAnswers:
    """What a model says about a batch.

    Attributes:
      predictions: likeliest token at each position; nothing meant at padding.
      num_steps: iterations that each token took; 0 at padding.
    """

    predictions: Int[Array, "B T"]
    num_steps: Int[Array, "B T"]


@dataclasses.dataclass(frozen=True)
class CachedScores:
    """Means over problems.

    Attributes:
      exact_accuracy: share of problems whose whole answer is right.
      accuracy: share of answer tokens that are right.
      mean_steps: iterations per token, of all tokens that are not padding.
      problems: how many.
    """

    exact_accuracy: float
    accuracy: float
    mean_steps: float
    problems: int


def pass_problems(
    model: MegaTransformer,
    params: Any,
    batch: Batch,
    cache: KVCache,
    rule: DepthRule,
    state_keys: Key[Array, "B"] | None,
    *,
    one_by_one: bool = True,
    warm_start: bool = False,
) -> CachedAnswers:
    """Passes a batch of problems through the model; one compilation serves all depths. Pure.

    Args:
      model: the model.
      params: its parameters.
      batch: one problem per row, padded on the right.
      cache: empty, with room for the batch's columns.
      rule: how deep; with one pass per token its `min_depth` may be each token's, [B, T].
      state_keys: see `NewTokens`.
      one_by_one: a pass per token, as in decoding; otherwise one pass for all, as in reading a
        prompt.
      warm_start: a token's first state is the last one of the token before.

    Raises:
      ValueError: if `warm_start` is wanted in one pass, where the token before has no last state
        yet.
    """
    if warm_start and not one_by_one:
        raise ValueError("warm_start needs one_by_one=True: in one pass all tokens start together.")
    differs = jnp.ndim(rule.min_depth) == 2
    if differs and not one_by_one:
        raise ValueError("min_depth per token needs one_by_one=True: a pass has one per row.")
    is_token = batch.segment_ids > 0
    least = rule.min_depth if differs else jnp.zeros(batch.tokens.shape, jnp.int32)

    def run(
        tokens: jax.Array, is_token: jax.Array, cache: KVCache, least: jax.Array, **given: Any
    ) -> CachedOutput:
        new = NewTokens(tokens, is_token, state_keys=state_keys, **given)
        of_pass: Any = rule
        if differs:
            of_pass = of_pass.replace(min_depth=least)
        return cached_forward(model, params, new, cache, of_pass)

    def answer(output: CachedOutput) -> tuple[jax.Array, jax.Array]:
        return jnp.argmax(output.logits, axis=-1).astype(jnp.int32), output.num_steps

    num_first = 1 if one_by_one else batch.tokens.shape[1]
    columns = (batch.tokens[:, :num_first], is_token[:, :num_first])
    first = run(*columns, cache, least[:, 0], is_first=True)
    if not one_by_one:
        return CachedAnswers(*answer(first))

    def read_one(carry: tuple[KVCache, Any], column: tuple[jax.Array, ...]) -> Any:
        cache, state = carry
        tokens, is_token, least = column
        given = {"state": state if warm_start else None}
        output = run(tokens[:, None], is_token[:, None], cache, least, **given)
        return (output.cache, output.state), answer(output)

    rest = (batch.tokens[:, 1:].T, is_token[:, 1:].T, least[:, 1:].T)
    _, others = jax.lax.scan(read_one, (first.cache, first.state), rest)

    def join(first: jax.Array, others: jax.Array) -> jax.Array:
        return jnp.concatenate([first, others[:, :, 0].T], axis=1)

    return CachedAnswers(*map(join, answer(first), others))


cached_answers = functools.partial(
    jax.jit, static_argnums=0, static_argnames=("one_by_one", "warm_start")
)(pass_problems)


def cached_scores(batches: Iterable[Batch], answers: Iterable[CachedAnswers]) -> CachedScores:
    """Scores the answers to batches; rows without an answer do not count.

    Raises:
      ValueError: if there is no problem, or one batch more or less than answers.
    """
    problems = exact = right = answer_tokens = tokens = steps = 0
    for batch, answer in zip(batches, answers, strict=True):
        counts = np.asarray(batch.loss_mask) > 0
        is_right = np.asarray(answer.predictions) == np.asarray(batch.targets)
        has_answer = np.asarray(counts.any(axis=1))
        problems += int(has_answer.sum())
        exact += int(((is_right | ~counts).all(axis=1) & has_answer).sum())
        right += int((is_right & counts).sum())
        answer_tokens += int(counts.sum())
        is_token = (np.asarray(batch.segment_ids) > 0) & has_answer[:, None]
        tokens += int(is_token.sum())
        steps += int(np.asarray(answer.num_steps)[is_token].sum())
    if not problems:
        raise ValueError("no row of the batches has an answer, so there is nothing to score.")
    return CachedScores(exact / problems, right / answer_tokens, steps / tokens, problems)
