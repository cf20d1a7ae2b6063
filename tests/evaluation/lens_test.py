"""The lens on one token behind a cache, against the model's pass over the whole text."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_model import PROMPTS, TINY, all_logits, depth_rule, make

from megatransformer_jax.evaluation.lens import trace_token, traced_criteria
from megatransformer_jax.models.passes.cached import NewTokens, cached_forward
from megatransformer_jax.nn.kv_cache import CacheShape, init_cache

DEPTH, TOP = 5, 3
IDS = PROMPTS[2]


@pytest.fixture(scope="module")
def found():
    """A trace of the last token of IDS, and logits if its iterations end after each number."""
    model, params = make()

    @jax.jit
    def look(params, ids):
        cache = init_cache(model.config, CacheShape(1, 64, 8, jnp.dtype(jnp.float32), "cpu"))
        before = NewTokens(ids[None, :-1], jnp.ones((1, len(IDS) - 1), bool))
        cache = cached_forward(model, params, before, cache, depth_rule(DEPTH)).cache
        new = NewTokens(ids[None, -1:], jnp.ones((1, 1), bool))
        sizes = {"num_iterations": 8, "top_k": TOP}
        trace = trace_token(model, params, new, cache, jnp.int32(DEPTH), jnp.int32(9), **sizes)

        def stopped(depth):
            return cached_forward(model, params, new, cache, depth_rule(depth)).logits[0, 0]

        return trace, jax.lax.map(stopped, 1 + jnp.arange(DEPTH))

    trace, logits = look(params, jnp.asarray(IDS))
    np.testing.assert_allclose(logits[-1], all_logits(model, params, IDS, DEPTH)[-1], atol=1e-4)
    return trace, np.asarray(logits, np.float64)


def test_each_iteration_scores_as_if_it_were_the_last(found):
    trace, before = found[0], None
    for iteration, logits in enumerate(found[1]):
        log_probs = logits - np.log(np.sum(np.exp(logits)))
        likeliest = np.argsort(-log_probs)[:TOP]
        np.testing.assert_array_equal(trace.top_ids[iteration], likeliest)
        np.testing.assert_allclose(trace.top_log_probs[iteration], log_probs[likeliest], atol=1e-4)
        assert trace.next_log_probs[iteration] == pytest.approx(log_probs[9], abs=1e-4)
        entropy = -np.sum(np.exp(log_probs) * log_probs)
        assert trace.entropies[iteration] == pytest.approx(entropy, abs=1e-4)
        if before is not None:
            kl = np.sum(np.exp(before) * (before - log_probs))
            assert trace.values["kl"][iteration] == pytest.approx(kl, rel=1e-2, abs=1e-5)
        before = log_probs


def test_all_criteria_but_the_fixed_one_are_traced(found):
    trace = found[0]
    assert "learned_gate" in traced_criteria(True)
    assert trace.values.keys() == set(traced_criteria(TINY.exit_gate.enabled))
    assert "learned_gate" not in trace.values
