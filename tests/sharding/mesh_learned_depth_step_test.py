"""A training step with an exit gate, a loss at every iteration, both terms of stability, value
embeddings and norms over all heads, sharded, equals one device's."""

import dataclasses

import jax
import numpy as np
import optax
from hlo import count_in_loops
from sharded_step import example_batch, run_config

from megatransformer_jax.config.layers import ValueEmbeddingConfig
from megatransformer_jax.config.loop import MeshConfig
from megatransformer_jax.config.recurrence import (
    ExitGateConfig,
    ExitGateTrainingConfig,
    StabilityConfig,
    SupervisionConfig,
)
from megatransformer_jax.models.megatransformer import build_model
from megatransformer_jax.sharding.mesh import make_mesh
from megatransformer_jax.sharding.rules import Sharder
from megatransformer_jax.training.state import init_state, state_shardings
from megatransformer_jax.training.step import make_train_step
from megatransformer_jax.types import DTypePolicy

OPTIMIZER = optax.sgd(0.1)


def with_all_terms():
    config = run_config()
    model = dataclasses.replace(
        config.model,
        prelude_layers=0,
        coda_layers=0,
        attention=dataclasses.replace(
            config.model.attention, qk_norm=True, qk_norm_span="width", core_windows=(4,)
        ),
        exit_gate=ExitGateConfig(enabled=True),
        value_embedding=ValueEmbeddingConfig((0,), 4),
    )
    train = dataclasses.replace(
        config.train,
        exit_gate=ExitGateTrainingConfig(max_steps=2),
        supervision=SupervisionConfig(prior="uniform", mix=0.5, max_steps=2),
        stability=StabilityConfig(jacobian_weight=0.5, fixed_point_weight=0.5),
    )
    return dataclasses.replace(config, model=model, train=train)


def compiled_step(config, sharder):
    model = build_model(config.model, DTypePolicy(), sharder, "cpu")
    batch, shardings = example_batch(), None
    if sharder.mesh is not None:
        shardings = state_shardings(model, OPTIMIZER, sharder)
        batch = jax.device_put(batch, sharder.sharding("batch", "length"))
    init = jax.jit(lambda key: init_state(model, OPTIMIZER, key), out_shardings=shardings)
    state = init(jax.random.key(0))
    step = jax.jit(make_train_step(model, OPTIMIZER, config), out_shardings=(shardings, None))
    compiled = step.lower(state, batch).compile()
    return compiled.as_text(), *compiled(state, batch)


def test_a_sharded_step_equals_the_single_device_one_and_gathers_outside_of_loops():
    config = with_all_terms()
    _, expected, expected_metrics = compiled_step(config, Sharder())
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2), jax.devices())
    text, state, metrics = compiled_step(config, Sharder(mesh))
    for name, value in expected_metrics.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-4, atol=1e-5, err_msg=name)
    assert metrics["jacobian_penalty"] > 0 and metrics["fixed_point_penalty"] > 0
    assert metrics["exit_mean_steps"] > 1 and metrics["supervised_loss"] > 0
    for (path, ours), theirs in zip(
        jax.tree_util.tree_leaves_with_path(state.params),
        jax.tree.leaves(expected.params),
        strict=True,
    ):
        name = jax.tree_util.keystr(path)
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5, err_msg=name)
    in_loops, total = count_in_loops(text, "all-gather")
    assert in_loops == 0 < total
