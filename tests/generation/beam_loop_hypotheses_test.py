"""Ranking of texts: length penalties of any size, empty places, equal scores."""

import jax.numpy as jnp
import numpy as np
import pytest

from megatransformer_jax.generation.beam_loop import (
    NO_TEXT,
    best_of,
    first_hypotheses,
    no_hypotheses,
    penalise_length,
)
from megatransformer_jax.generation.endings import EXHAUSTED, RUNNING, Ending
from megatransformer_jax.generation.history import history_of_prompts


def hypotheses(scores):
    """Two prompts' texts, whose log-probabilities are their numbers."""
    history = history_of_prompts([[5], [6, 7]], 4, pad_id=0)
    ending = Ending(jnp.zeros(0, jnp.int32), jnp.int32(3))
    numbers = jnp.arange(np.size(scores), dtype=jnp.float32).reshape(np.shape(scores))
    first = first_hypotheses(history, ending, np.shape(scores)[1])
    return first.replace(scores=jnp.asarray(scores, jnp.float32), log_probs=numbers)


def test_it_begins_with_one_text_per_prompt():
    first = hypotheses([[0.0, NO_TEXT], [0.0, NO_TEXT]])
    assert first.is_text.tolist() == [[True, False]] * 2
    assert first.num_generated.tolist() == [[0, 0]] * 2
    assert first.last_tokens.tolist() == [[5, 5], [7, 7]]
    assert not np.any(first.end.reason != RUNNING)
    empty = no_hypotheses(first)
    assert not np.any(empty.is_text) and np.all(empty.end.reason == EXHAUSTED)


@pytest.mark.parametrize("length_penalty", [-1e6, -300.0, -1.0, 0.0, 0.6, 300.0, 1e6])
def test_every_penalty_leaves_texts_finite(length_penalty):
    sums = jnp.array([[-3.0, -1e-30, 0.0, -1e30, 2.0, NO_TEXT]])
    lengths = jnp.array([[2, 7, 0, 1000, 3, 5]])
    scores = penalise_length(sums, lengths, jnp.float32(length_penalty))
    assert np.isfinite(scores[0, :5]).all()
    assert scores[0, 5] == NO_TEXT
    if abs(length_penalty) <= 1:
        wanted = sums[0, :5] / np.array([2.0, 7, 1, 1000, 3]) ** length_penalty
        np.testing.assert_allclose(scores[0, :5], wanted, rtol=1e-5)


def test_penalties_may_differ_between_prompts():
    sums, lengths = jnp.full((2, 1), -8.0), jnp.full((2, 1), 4)
    assert penalise_length(sums, lengths, jnp.array([1.0, 0.5])).tolist() == [[-2.0], [-4.0]]


def test_the_best_of_both_come_first():
    first = hypotheses([[-1.0, -5.0, NO_TEXT], [NO_TEXT] * 3])
    second = hypotheses([[-9.0, -5.0, -2.0], [NO_TEXT, -7.0, NO_TEXT]])
    second = second.replace(log_probs=second.log_probs + 100)
    best = best_of(first, second, 3)
    assert best.scores.tolist() == [[-1.0, -2.0, -5.0], [-7.0, NO_TEXT, NO_TEXT]]
    # Of the equal ones that of `first`.
    assert best.log_probs[0].tolist() == [0.0, 102.0, 1.0]
    assert best.log_probs[1, 0] == 104.0
    np.testing.assert_array_equal(best.history.prompt_lengths, [[1] * 3, [2] * 3])
