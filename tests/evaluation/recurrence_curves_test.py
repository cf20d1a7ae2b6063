"""Curves over iterations equal those of a plain loop; padding does not count."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from megatransformer_jax.config.layers import AttentionConfig
from megatransformer_jax.config.model import MlpConfig, ModelConfig
from megatransformer_jax.config.recurrence import RecurrenceConfig
from megatransformer_jax.evaluation.recurrence import iteration_curves
from megatransformer_jax.models.megatransformer import build_model, init_params
from megatransformer_jax.models.passes.observed import open_core
from megatransformer_jax.sharding.rules import Sharder
from megatransformer_jax.types import Batch, DTypePolicy

ROWS, LENGTH, STEPS = 2, 5, 3


def tiny_model(core_layers=1):
    recurrence = RecurrenceConfig(state_init="normal", core_width=12) if core_layers else None
    config = ModelConfig(
        vocab_size=16,
        width=8,
        max_length=8,
        core_layers=core_layers,
        attention=AttentionConfig(num_heads=2),
        mlp=MlpConfig(hidden_width=8),
        recurrence=recurrence or RecurrenceConfig(),
    )
    return build_model(config, DTypePolicy(), Sharder(), "cpu")


def example_batch(num_tokens=LENGTH):
    tokens = np.random.default_rng(0).integers(0, 16, (ROWS, LENGTH)).astype(np.int32)
    positions = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), tokens.shape)
    segments = np.where(positions < num_tokens, 1, 0).astype(np.int32)
    return Batch(tokens, tokens, np.ones_like(tokens, np.float32), segments, positions)


def python_states(model, params, batch, key):
    """h_0, h_1, ... of a plain loop."""
    batch = jax.tree.map(jnp.asarray, batch)
    core = open_core(
        model, params, batch.tokens, positions=batch.positions, segment_ids=batch.segment_ids
    )
    states = [core.first_state(key)]
    for iteration in range(STEPS + 1):
        states.append(core.iterate(states[-1], iteration))
    return [np.asarray(state) for state in states]


def test_curves_equal_a_plain_loop_and_leave_padding_out():
    model, key = tiny_model(), jax.random.key(1)
    params = init_params(model, jax.random.key(0))
    for num_tokens in (LENGTH, LENGTH - 2):
        batch = example_batch(num_tokens)
        states = [s[:, :num_tokens] for s in python_states(model, params, batch, key)]

        def size(array):
            return np.sqrt((array**2).sum((1, 2)))

        moves = [size(new - old) for old, new in itertools.pairwise(states)]
        curves = iteration_curves(model, params, batch, STEPS, key)
        for i in range(1, STEPS + 1):
            residual = (moves[i - 1] / size(states[i])).mean()
            np.testing.assert_allclose(curves.residual[i - 1], residual, rtol=1e-4)
            contraction = (moves[i] / moves[i - 1]).mean()
            np.testing.assert_allclose(curves.contraction[i - 1], contraction, rtol=1e-4)
            norm = (size(states[i]) / np.sqrt(num_tokens)).mean()
            np.testing.assert_allclose(curves.state_norm[i - 1], norm, rtol=1e-4)


def test_wrong_input_is_an_error():
    model = tiny_model()
    params = init_params(model, jax.random.key(0))
    with pytest.raises(ValueError, match="num_steps is 0"):
        iteration_curves(model, params, example_batch(), 0, jax.random.key(0))
    plain = tiny_model(core_layers=0)
    with pytest.raises(ValueError, match="core_layers=0"):
        iteration_curves(
            plain, init_params(plain, jax.random.key(0)), example_batch(), 2, jax.random.key(0)
        )
