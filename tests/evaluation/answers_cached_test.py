"""Answers with a cache against those without one, against a loop by hand, and their scores."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from megatransformer_jax.config.layers import AttentionConfig
from megatransformer_jax.config.model import ModelConfig
from megatransformer_jax.config.recurrence import RecurrenceConfig
from megatransformer_jax.data.reasoning import ProblemSet
from megatransformer_jax.data.reasoning.tasks import Parity
from megatransformer_jax.evaluation.answers import CachedAnswers, cached_answers, cached_scores
from megatransformer_jax.evaluation.validation import make_eval_step
from megatransformer_jax.models.exit_criteria import DepthRule, exit_criterion
from megatransformer_jax.models.megatransformer import build_model, init_params
from megatransformer_jax.models.passes.cached import NewTokens, cached_forward
from megatransformer_jax.nn.kv_cache import CacheShape, init_cache
from megatransformer_jax.sharding.rules import Sharder
from megatransformer_jax.types import Batch, DTypePolicy

DEPTH = 3
CONFIG = ModelConfig(
    vocab_size=4,
    width=16,
    max_length=16,
    attention=AttentionConfig(num_heads=2),
    mlp=dataclasses.replace(ModelConfig().mlp, hidden_width=24),
    recurrence=RecurrenceConfig(mean_steps=3, backprop_depth=2, state_init="zero"),
)


@functools.cache
def model_and_params():
    model = build_model(CONFIG, DTypePolicy(), Sharder(), "cpu")
    params = init_params(model, jax.random.key(0))
    # Larger than fresh ones, so that predictions are not all the same.
    return model, jax.tree.map(lambda leaf: 3 * leaf, params)


def make_batch() -> Batch:
    """Three problems of unequal length and one row of padding."""
    problems = ProblemSet(Parity(), 2, 6, size=3, sequence_length=7, seed=0)
    return jax.device_put(problems.batch([0, 1, 2], num_rows=4))


def make_cache():
    return init_cache(
        CONFIG, CacheShape(4, 7, num_slots=DEPTH, dtype=jnp.dtype("float32"), platform="cpu")
    )


def depth_rule(name="fixed", threshold=0.0, min_depth=1):
    return DepthRule(
        jnp.int32(DEPTH), jnp.float32(threshold), jnp.int32(min_depth), exit_criterion(name)
    )


@pytest.mark.parametrize("one_by_one", [True, False])
def test_a_full_cache_answers_as_without_one(one_by_one):
    model, params = model_and_params()
    batch = make_batch()
    answers = cached_answers(
        model, params, batch, make_cache(), depth_rule(), None, one_by_one=one_by_one
    )
    sums, predictions = make_eval_step(model, jax.random.key(0))(params, batch, jnp.int32(DEPTH))
    is_token = np.asarray(batch.segment_ids) > 0
    np.testing.assert_array_equal(
        np.asarray(answers.predictions)[is_token], np.asarray(predictions)[is_token]
    )
    assert len(np.unique(np.asarray(predictions)[is_token])) > 1
    np.testing.assert_array_equal(answers.num_steps, DEPTH * is_token)
    scores = cached_scores([batch], [answers])
    assert scores.accuracy == pytest.approx(float(sums.correct / sums.tokens))
    assert scores.exact_accuracy == pytest.approx(float(sums.exact_rows / sums.rows))
    assert (scores.mean_steps, scores.problems) == (DEPTH, 3)


def test_tokens_exit_and_what_they_took_is_counted():
    model, params = model_and_params()
    batch, always = make_batch(), depth_rule("latent_diff", np.inf, min_depth=2)
    answers = cached_answers(model, params, batch, make_cache(), always, None)
    np.testing.assert_array_equal(answers.num_steps, 2 * (np.asarray(batch.segment_ids) > 0))
    assert cached_scores([batch], [answers]).mean_steps == 2


def test_warm_start_hands_the_last_state_on():
    model, params = model_and_params()
    batch, rule = make_batch(), depth_rule()
    is_token = batch.segment_ids > 0
    warm = cached_answers(model, params, batch, make_cache(), rule, None, warm_start=True)
    run = jax.jit(lambda params, new, cache: cached_forward(model, params, new, cache, rule))
    # The first token's state is `state_init`: zero.
    cache, state, columns = make_cache(), jnp.zeros((4, 1, CONFIG.core_width)), []
    for column in range(batch.tokens.shape[1]):
        here = slice(column, column + 1)
        new = NewTokens(batch.tokens[:, here], is_token[:, here], state=state)
        output = run(params, new, cache)
        cache, state = output.cache, output.state
        columns.append(jnp.argmax(output.logits, axis=-1))
    expected = jnp.concatenate(columns, axis=1)[is_token]
    np.testing.assert_array_equal(warm.predictions[is_token], expected)
    cold = cached_answers(model, params, batch, make_cache(), rule, None)
    assert np.any(cold.predictions[is_token] != expected)


def test_warm_start_in_one_pass_is_an_error():
    model, params = model_and_params()
    with pytest.raises(ValueError, match="one_by_one=True"):
        cached_answers(
            model,
            params,
            make_batch(),
            make_cache(),
            depth_rule(),
            None,
            one_by_one=False,
            warm_start=True,
        )


def test_scores_by_hand():
    tokens = np.array([[1, 2, 3], [1, 2, 0], [1, 3, 2], [0, 0, 0]], np.int32)
    targets = np.array([[0, 2, 3], [0, 2, 0], [0, 3, 3], [0, 0, 0]], np.int32)
    mask = np.array([[0, 1, 1], [0, 1, 0], [0, 1, 1], [0, 0, 0]], np.float32)
    batch = Batch(tokens, targets, mask, (tokens > 0).astype(np.int32), np.zeros_like(tokens))
    # The first answer is right, whatever is said before it; the second wrong; the third half right.
    answers = CachedAnswers(
        jnp.array([[7, 2, 3], [0, 3, 9], [0, 3, 2], [0, 0, 0]], jnp.int32),
        jnp.array([[1, 2, 3], [4, 5, 0], [1, 1, 1], [0, 0, 0]], jnp.int32),
    )
    scores = cached_scores([batch, batch], [answers, answers])
    assert scores.exact_accuracy == pytest.approx(1 / 3)
    assert scores.accuracy == pytest.approx(3 / 5)
    assert scores.mean_steps == pytest.approx(18 / 8)
    assert scores.problems == 6


def test_nothing_to_score_is_an_error():
    empty = np.zeros((1, 2), np.int32)
    batch = Batch(empty, empty, empty.astype(np.float32), empty, empty)
    answers = CachedAnswers(jnp.asarray(empty), jnp.asarray(empty))
    with pytest.raises(ValueError, match="nothing to score"):
        cached_scores([batch], [answers])
