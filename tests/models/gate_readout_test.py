"""What the gate's read-outs take from all iterations: by formula, in whole passes and in cached."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cached_passes import empty_cache, in_passes, make, rule, some_tokens, tiny

from megatransformer_jax.config.option import ConfigError
from megatransformer_jax.config.recurrence import ExitGateConfig
from megatransformer_jax.config.sampling import DepthConfig
from megatransformer_jax.evaluation.validation import make_eval_step
from megatransformer_jax.models.gate_readout import make_readout
from megatransformer_jax.types import Batch

DEPTH = 6
CONFIG = tiny(prelude_layers=0, core_layers=1, exit_gate=ExitGateConfig(enabled=True))
WAYS = [("threshold", 0.3), ("threshold", 0.8), ("weighted", 0.5)]
TOKENS = some_tokens(3, 8)


@pytest.fixture(scope="module")
def gated():
    """A model whose tokens differ in where they would exit."""
    model, params = make(CONFIG)
    weight = 4 * params["exit_gate"]["weight"]
    params = {**params, "exit_gate": {**params["exit_gate"], "weight": weight}}
    return model, params


@functools.partial(jax.jit, static_argnums=0)
def whole(model, params, depth, readout=None, tokens=TOKENS):
    output, sown = model.apply(
        {"params": params}, tokens, num_steps=depth, readout=readout, mutable=["last_state"]
    )
    return output, sown["last_state"]["state"][0]


def after_each_iteration(gated, depth=DEPTH):
    """States [depth, B, T, D] and exit probabilities [depth, B, T], float64."""
    model, params = gated
    states = [whole(model, params, jnp.int32(count))[1] for count in range(1, depth + 1)]
    gates = [model.apply({"params": params}, state, method="run_gate") for state in states]
    stop = 1 / (1 + np.exp(-np.asarray(gates, np.float64)))
    stop[-1] = 1
    there = np.concatenate([np.ones_like(stop[:1]), np.cumprod(1 - stop[:-1], axis=0)])
    return np.asarray(states, np.float64), stop * there


def by_formula(kind, threshold, states, shares):
    if kind == "weighted":
        return (shares[..., None] * states).sum(0)
    chosen = np.argmax(np.cumsum(shares, axis=0) >= threshold, axis=0)
    assert len(np.unique(chosen)) >= 3
    return np.take_along_axis(states, chosen[None, ..., None], axis=0)[0]


@pytest.mark.parametrize(("kind", "threshold"), WAYS)
def test_whole_and_cached_passes_read_by_the_formula(gated, kind, threshold):
    model, params = gated
    readout = make_readout(kind, threshold)
    wanted = by_formula(kind, threshold, *after_each_iteration(gated))
    output, last = whole(model, params, jnp.int32(DEPTH), readout)
    normed = wanted / np.sqrt((wanted**2).mean(-1, keepdims=True) + CONFIG.norm.eps)
    normed = normed * np.asarray(params["final_norm"]["scale"])
    np.testing.assert_allclose(output.latent, normed, rtol=1e-4, atol=1e-5)
    # The core goes on from its own last state, not from what was read.
    np.testing.assert_array_equal(last, whole(model, params, jnp.int32(DEPTH))[1])

    cache = empty_cache(CONFIG, 3, num_slots=DEPTH)
    reading = rule(DEPTH).replace(readout=readout)
    everything = jnp.ones(TOKENS.shape, bool)
    for sizes in ([8], [3, 3, 1, 1]):
        logits, steps, _ = in_passes(model, params, TOKENS, everything, cache, reading, sizes)
        np.testing.assert_allclose(logits, output.logits, rtol=2e-5, atol=2e-5)
        assert np.all(steps == DEPTH)


def test_rows_of_different_depths_are_read_each_to_its_end(gated):
    model, params = gated
    depths, readout = [2, 5, 4], make_readout("weighted", 0.5)
    together, _ = whole(model, params, jnp.asarray(depths), readout)
    reading = rule(depths).replace(readout=readout)
    cache = empty_cache(CONFIG, 3, num_slots=5)
    everything = jnp.ones(TOKENS.shape, bool)
    logits, _, _ = in_passes(model, params, TOKENS, everything, cache, reading, [8])
    np.testing.assert_allclose(logits, together.logits, rtol=2e-5, atol=2e-5)
    for row, depth in enumerate(depths):
        alone, _ = whole(model, params, jnp.int32(depth), readout)
        np.testing.assert_allclose(together.logits[row], alone.logits[row], rtol=1e-5, atol=1e-5)


def test_scores_are_those_of_what_is_read(gated):
    model, params = gated
    readout = make_readout("threshold", 0.5)
    ones = jnp.ones(TOKENS.shape)
    places = jnp.broadcast_to(jnp.arange(8), TOKENS.shape)
    batch = Batch(TOKENS, TOKENS, ones, jnp.ones(TOKENS.shape, jnp.int32), places)
    step = make_eval_step(model, jax.random.key(0), readout)
    sums, predictions = step(params, batch, jnp.int32(DEPTH))
    logits = whole(model, params, jnp.int32(DEPTH), readout)[0].logits
    np.testing.assert_array_equal(predictions, np.argmax(logits, -1))
    log_probs = jax.nn.log_softmax(logits)
    wanted = -np.take_along_axis(np.asarray(log_probs), np.asarray(TOKENS)[..., None], -1).sum()
    np.testing.assert_allclose(sums.cross_entropy, wanted, rtol=1e-5)


def test_bad_input():
    assert make_readout("last", 0.5) is None
    with pytest.raises(ConfigError, match=r"gate_threshold: 0\.2 would be ignored with"):
        DepthConfig(gate_readout="weighted", gate_threshold=0.2)
    with pytest.raises(ConfigError, match=r"gate_readout: 'weighted' needs a model with an exit"):
        DepthConfig(gate_readout="weighted").check_gate(has_exit_gate=False)
    model, params = make(CONFIG)
    readout = make_readout("weighted", 0.5)
    with pytest.raises(ValueError, match="a readout is for inference alone"):
        model.apply({"params": params}, TOKENS, num_steps=2, backprop_depth=1, readout=readout)
