"""The exit gate: its formula, where it starts, and that it leaves the rest of a model alone."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from megatransformer_jax.config.layers import AttentionConfig
from megatransformer_jax.config.model import MlpConfig, ModelConfig
from megatransformer_jax.config.recurrence import ExitGateConfig, RecurrenceConfig
from megatransformer_jax.models.cost.parameter_counts import count_parameters
from megatransformer_jax.models.megatransformer import build_model, init_params, param_axes
from megatransformer_jax.nn.adapters import ExitGate, log_continue, log_stop
from megatransformer_jax.sharding.rules import Sharder
from megatransformer_jax.types import DTypePolicy

PLAIN = ModelConfig(
    vocab_size=16,
    width=8,
    max_length=8,
    core_layers=1,
    attention=AttentionConfig(num_heads=2),
    mlp=MlpConfig(hidden_width=8),
    recurrence=RecurrenceConfig(mean_steps=5, core_width=12),
)
GATED = dataclasses.replace(PLAIN, exit_gate=ExitGateConfig(enabled=True))


def built(config):
    return build_model(config, DTypePolicy(), Sharder(), "cpu")


def test_the_formula_and_the_start():
    rng = np.random.default_rng(0)
    state = rng.normal(size=(2, 3, 12)).astype(np.float32)
    params = {
        "norm": {"scale": jnp.asarray(rng.normal(size=12), jnp.float32)},
        "weight": jnp.asarray(rng.normal(size=12), jnp.float32),
        "bias": jnp.float32(0.3),
    }
    size = np.sqrt((state**2).mean(-1, keepdims=True) + GATED.norm.eps)
    wanted = (state / size * params["norm"]["scale"]) @ params["weight"] + 0.3
    gate = ExitGate(GATED)
    logits = gate.apply({"params": params}, jnp.asarray(state))
    np.testing.assert_allclose(logits, wanted, rtol=1e-5, atol=1e-6)
    stop = 1 / (1 + np.exp(-np.asarray(wanted, np.float64)))
    np.testing.assert_allclose(np.exp(log_stop(logits)), stop, rtol=1e-5)
    np.testing.assert_allclose(np.exp(log_continue(logits)), 1 - stop, rtol=1e-5)
    bare = dataclasses.replace(GATED, exit_gate=ExitGateConfig(enabled=True, norm=False))
    logits = ExitGate(bare).apply({"params": {**params, "norm": {}}}, jnp.asarray(state))
    np.testing.assert_allclose(logits, state @ params["weight"] + 0.3, rtol=1e-5, atol=1e-6)


def test_a_gate_adds_its_parameters_and_changes_no_others():
    model = built(GATED)
    plain = init_params(built(PLAIN), jax.random.key(3))
    params = init_params(model, jax.random.key(3))
    gate = params["exit_gate"]
    gated = {name: tree for name, tree in params.items() if name != "exit_gate"}
    jax.tree.map(np.testing.assert_array_equal, plain, gated)
    axes = param_axes(model)["exit_gate"]
    assert jax.tree.map(len, axes, is_leaf=lambda a: isinstance(a, tuple)) == jax.tree.map(
        jnp.ndim, gate
    )
    counts = count_parameters({"exit_gate": gate})
    assert counts == {"exit_gate": {"norms": 12, "other": 13}}
    logits = model.apply({"params": params}, jnp.ones((1, 2, 12)), method="run_gate")
    np.testing.assert_allclose(jax.nn.sigmoid(logits), 1 / 5, rtol=1e-5)
    with pytest.raises(ValueError, match=r"no exit gate; train one with model\.exit_gate\.enabled"):
        built(PLAIN).apply({"params": plain}, jnp.ones((1, 2, 12)), method="run_gate")
