"""The likeliest token or a draw with the right probabilities, row by row."""

import jax
import jax.numpy as jnp
import numpy as np

from megatransformer_jax.generation.history import history_of_prompts
from megatransformer_jax.generation.processors.cuts import Temperature, TopK
from megatransformer_jax.generation.processors.processor import AllowedTokens, init_chain
from megatransformer_jax.generation.token_choice import choose, token_log_probs, top_log_probs

V = 12
compiled_choose = jax.jit(choose, static_argnames="is_drawn")


def some_logits(rows, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(0, 2, (rows, V)), jnp.float32)


def choose_from(logits, chain=(), prompts=None, keys=None, is_drawn=False):
    rows = len(logits)
    history = history_of_prompts(prompts or [[1, 2]] * rows, 8, 0)
    if keys is None:
        keys = jax.random.split(jax.random.key(5), rows)
    states = init_chain(chain, history)
    return compiled_choose(chain, states, history, logits, keys, is_drawn=is_drawn)


def test_greedy_takes_the_likeliest_that_the_chain_leaves():
    logits = some_logits(6)
    best = np.argmax(logits, axis=1)
    np.testing.assert_array_equal(choose_from(logits).tokens, best)
    ban_best = AllowedTokens(jnp.arange(V) != best[:, None])
    choice = choose_from(logits, (ban_best,))
    np.testing.assert_array_equal(choice.tokens, np.argsort(logits, axis=1)[:, -2])
    # The score is the model's own, whatever is banned.
    np.testing.assert_allclose(choice.log_probs, token_log_probs(logits, choice.tokens), atol=1e-6)


def test_draws_have_the_probabilities_that_the_chain_leaves():
    """Chi-square of many rows with the same scores, at temperature 0.7 and top 9."""
    rows, temperature, kept = 6000, 0.7, 9
    logits = some_logits(1)
    chain = (Temperature(jnp.float32(temperature)), TopK(jnp.int32(kept)))
    choice = choose_from(jnp.tile(logits, (rows, 1)), chain, is_drawn=True)
    scores = np.asarray(logits[0], np.float64) / temperature
    scores[np.argsort(scores)[:-kept]] = -np.inf
    expected = rows * np.exp(scores) / np.exp(scores).sum()
    observed = np.bincount(choice.tokens, minlength=V)
    assert observed[expected == 0].sum() == 0
    observed, expected = observed[expected > 0], expected[expected > 0]
    # 8 degrees of freedom: 99.9% of true samples stay below 26.1.
    assert np.sum((observed - expected) ** 2 / expected) < 26.1


def test_a_draw_depends_on_key_length_and_scores_of_its_row_alone():
    logits = jnp.tile(some_logits(1), (40, 1))
    keys = jax.random.split(jax.random.key(0), 40)
    prompts = [[1, 2]] * 20 + [[1, 2, 3]] * 20
    tokens = choose_from(logits, (), prompts, keys, is_drawn=True).tokens
    assert len(np.unique(tokens)) > 2
    # Another batch, another place, other tokens before it.
    order = np.arange(40)[::-2]
    others = [[7] * len(prompts[row]) for row in order]
    again = choose_from(logits[order], (), others, keys[order], is_drawn=True).tokens
    np.testing.assert_array_equal(again, tokens[order])
    # One token later the same key draws something else.
    longer = [[*prompt, 4] for prompt in prompts]
    assert np.any(choose_from(logits, (), longer, keys, is_drawn=True).tokens != tokens)


def test_rows_without_any_token_left_are_told():
    chain = (AllowedTokens(jnp.array([[True], [False]])),)
    for is_drawn in (False, True):
        choice = choose_from(some_logits(2), chain, is_drawn=is_drawn)
        assert choice.is_exhausted.tolist() == [False, True]


def test_some_rows_are_drawn_and_others_not():
    logits, keys = some_logits(8), jax.random.split(jax.random.key(1), 8)
    is_drawn = jnp.arange(8) % 2 == 0
    chain = (Temperature(jnp.where(is_drawn, 1.0, 0.0)),)
    drawn = choose_from(logits, chain, keys=keys, is_drawn=True)
    likeliest = choose_from(logits, keys=keys)
    history = history_of_prompts([[1, 2]] * 8, 8, 0)
    for wanted in (is_drawn, jnp.zeros(8, bool)):
        mixed = jax.jit(choose)(chain, ((),), history, logits, keys, is_drawn=wanted)
        expected = np.where(wanted, drawn.tokens, likeliest.tokens)
        is_compared = np.asarray(wanted | ~is_drawn)
        np.testing.assert_array_equal(mixed.tokens[is_compared], expected[is_compared])
    assert np.any(drawn.tokens != likeliest.tokens)


def test_the_likeliest_tokens_come_in_order():
    logits = jnp.round(some_logits(5))  # with ties
    top = jax.jit(top_log_probs, static_argnums=2)
    expected = np.asarray(jax.nn.log_softmax(logits))
    order = np.argsort(-expected, axis=1, kind="stable")[:, :4]
    ids, log_probs = top(logits, jnp.array([0, 4, 1, 2, 0]), 4)
    np.testing.assert_array_equal(ids, order)
    np.testing.assert_allclose(log_probs, np.take_along_axis(expected, order, 1), atol=1e-6)
    ids, log_probs = top(logits, jnp.zeros(5, jnp.int32), 4)
    assert (ids == -1).all()
    assert (log_probs == 0).all()
    ids, log_probs = top(logits, jnp.ones(5, jnp.int32), V + 2)  # more than there are
    assert (ids[:, V:] == -1).all()
    assert (log_probs[:, V:] == 0).all()


def test_log_probabilities_of_tokens():
    logits = some_logits(5)
    tokens = jnp.array([0, 11, 3, 3, 7])
    scores = np.asarray(logits, np.float64)
    wanted = np.log(np.exp(scores) / np.exp(scores).sum(1, keepdims=True))[range(5), tokens]
    np.testing.assert_allclose(token_log_probs(logits, tokens), wanted, atol=1e-6)
