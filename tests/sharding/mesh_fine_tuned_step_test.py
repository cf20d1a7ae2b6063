"""LoRA over an int8 base: a sharded step equals the single-device one, and the base stays."""

import dataclasses

import jax
import numpy as np
import optax
import pytest
from sharded_step import example_batch, run_config

from megatransformer_jax.config.fine_tuning import FineTuningConfig, LoraConfig
from megatransformer_jax.config.loop import MeshConfig
from megatransformer_jax.models.megatransformer import build_model
from megatransformer_jax.sharding.mesh import make_mesh
from megatransformer_jax.sharding.rules import Sharder
from megatransformer_jax.training.state import init_state, state_shardings
from megatransformer_jax.training.step import make_train_step
from megatransformer_jax.types import DTypePolicy

LORA = LoraConfig(rank=2, targets=("attention/qkv$", "mlp/down$"))
FINE_TUNING = FineTuningConfig(init_from="runs/base", lora=LORA, base_precision="int8")
OPTIMIZER = optax.adamw(0.1, weight_decay=0.5)
# A core alone: what is outside it shards in the same way and takes as long again to compile.
MODEL = dataclasses.replace(run_config().model, prelude_layers=0, coda_layers=0)
CONFIG = dataclasses.replace(run_config(), model=MODEL, fine_tuning=FINE_TUNING)


def two_steps(sharder):
    """The state before, after two steps, and the metrics; b moves first, then a too."""
    model = build_model(CONFIG.model, DTypePolicy(), sharder, "cpu")
    shardings, batch = None, example_batch()
    if sharder.mesh is not None:
        shardings = state_shardings(model, OPTIMIZER, sharder, fine_tuning=FINE_TUNING)
        batch = jax.device_put(batch, sharder.sharding("batch", "length"))
    init = jax.jit(
        lambda key: init_state(model, OPTIMIZER, key, fine_tuning=FINE_TUNING),
        out_shardings=shardings,
    )
    step = make_train_step(model, OPTIMIZER, CONFIG)
    step = jax.jit(step, out_shardings=None if shardings is None else (shardings, None))
    before = init(jax.random.key(0))
    state, first = step(before, batch)
    return before, *step(state, batch), first


@pytest.fixture(scope="module")
def runs():
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2), jax.devices())
    return two_steps(Sharder()), two_steps(Sharder(mesh))


def test_a_sharded_step_equals_the_single_device_one(runs):
    (_, expected, expected_metrics, _), (_, ours, metrics, _) = runs
    for name, value in expected_metrics.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-4, atol=1e-5, err_msg=name)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-4),
        ours.params["lora"],
        expected.params["lora"],
    )


def test_the_base_stays_and_the_updates_move(runs):
    for before, after, metrics, first in runs:
        jax.tree.map(np.testing.assert_array_equal, before.params["base"], after.params["base"])
        moved = jax.tree.map(
            lambda a, b: float(np.max(np.abs(np.asarray(a) - np.asarray(b)))),
            before.params["lora"],
            after.params["lora"],
        )
        assert min(jax.tree.leaves(moved)) > 1e-3
        assert metrics["loss"] < first["loss"]


def test_stored_weights_and_updates_are_cut_by_the_rules_table(runs):
    state = runs[1][0]
    layer = state.params["base"]["core"]["layers"]["layer_0"]["attention"]["qkv"]
    assert layer.qvalue.dtype == np.int8
    assert (layer.qvalue.shape, layer.scale.shape) == ((16, 2, 4, 4), (1, 2, 4, 4))
    assert layer.qvalue.addressable_shards[0].data.shape == (8, 1, 4, 4)
    assert layer.scale.addressable_shards[0].data.shape == (1, 1, 4, 4)
    update = state.params["lora"]["core"]["layers"]["layer_0"]["attention"]["qkv"]
    assert update["a"].addressable_shards[0].data.shape == (8, 2)
    assert update["b"].addressable_shards[0].data.shape == (2, 1, 4, 4)
    moments = state.opt_state[0].mu["lora"]["core"]["layers"]["layer_0"]["attention"]["qkv"]
    assert moments["a"].addressable_shards[0].data.shape == (8, 2)
