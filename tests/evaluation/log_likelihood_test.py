"""Log-likelihoods do not depend on what else is scored, nor on padding."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from megatransformer_jax.config.layers import AttentionConfig
from megatransformer_jax.config.model import ModelConfig
from megatransformer_jax.config.recurrence import RecurrenceConfig
from megatransformer_jax.evaluation.log_likelihood import Continuation, LogLikelihoodScorer
from megatransformer_jax.models.megatransformer import build_model, init_params
from megatransformer_jax.models.passes.cached import token_states
from megatransformer_jax.sharding.rules import Sharder
from megatransformer_jax.types import DTypePolicy

CONFIG = ModelConfig(
    vocab_size=32,
    width=8,
    max_length=40,
    core_layers=1,
    prelude_layers=0,
    coda_layers=0,
    attention=AttentionConfig(num_heads=2),
    mlp=dataclasses.replace(ModelConfig().mlp, hidden_width=8),
    recurrence=RecurrenceConfig(mean_steps=2, backprop_depth=2, state_init="normal"),
)
REQUESTS = [
    Continuation([1, 5, 9], [4, 7]),
    Continuation(list(range(1, 25)), [3] * 6),
    Continuation([1], [8]),
    Continuation([1, 5, 9, 4], [7]),
]


@pytest.fixture(scope="module")
def tiny():
    model = build_model(CONFIG, DTypePolicy(), Sharder(), "cpu")
    shapes = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
    rng = np.random.default_rng(0)
    draw = lambda leaf: jnp.asarray(rng.normal(0.3, 0.5, leaf.shape), leaf.dtype)  # noqa: E731
    return model, jax.tree.map(draw, shapes)


def scorer(tiny, **changes):
    values = {"depth": 2, "batch_size": 4, "max_length": 40, **changes}
    return LogLikelihoodScorer(*tiny, **values)


@pytest.fixture(scope="module")
def together(tiny):
    counts = []
    scores = scorer(tiny).score(REQUESTS, counts.append)
    assert counts == [4]
    return scores


def test_first_states_are_drawn_by_place(tiny, together):
    """As the model computes them for the one text without padding."""
    model, params = tiny
    request = REQUESTS[0]
    tokens = jnp.asarray([[*request.context, *request.tokens]])
    places = jnp.arange(tokens.shape[1])[None]
    like = jnp.zeros((*tokens.shape, CONFIG.core_width))
    state = token_states(CONFIG, jax.random.key(0)[None], places, like)
    apply = jax.jit(lambda state: model.apply({"params": params}, tokens, num_steps=2, state=state))
    logits = np.asarray(apply(state).logits[0], np.float64)
    log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    wanted = log_probs[2, 4] + log_probs[3, 7]
    assert together[0].log_prob == pytest.approx(wanted, abs=1e-4)
    assert together[0].is_greedy == (list(logits[2:4].argmax(-1)) == [4, 7])


def test_others_and_padding_change_nothing(tiny, together):
    alone = [scorer(tiny).score([request])[0] for request in REQUESTS]
    for got, wanted in zip(alone, together, strict=True):
        assert got.log_prob == pytest.approx(wanted.log_prob, abs=1e-4)
        assert got.is_greedy == wanted.is_greedy
    # The first request's two tokens one by one.
    one = scorer(tiny).score([Continuation([1, 5, 9], [4])])[0].log_prob
    assert one + together[3].log_prob == pytest.approx(together[0].log_prob, abs=1e-4)


def test_depth_and_seed_count(tiny, together):
    for changes in ({"depth": 3}, {"seed": 1}):
        other = scorer(tiny, **changes).score(REQUESTS)
        assert abs(other[0].log_prob - together[0].log_prob) > 1e-3


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"depth": None}, "depth is None, but the model has a core"),
        ({"depth": 0}, "at least 1"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"max_length": 41}, "must be 1 to 40"),
    ],
)
def test_wrong_settings(tiny, changes, problem):
    with pytest.raises(ValueError, match=problem):
        scorer(tiny, **changes)


@pytest.mark.parametrize(
    ("request_", "problem"),
    [
        (Continuation([], [1]), "request 0 has an empty context"),
        (Continuation([1], []), "request 0 has an empty continuation"),
        (Continuation([1], [2] * 41), "continuation of 41 tokens"),
    ],
)
def test_wrong_requests(tiny, request_, problem):
    with pytest.raises(ValueError, match=problem):
        scorer(tiny).score([request_])
