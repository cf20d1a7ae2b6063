"""One training step of a small run, on one device and on a mesh."""

import functools

import jax
import numpy as np
import optax

from megatransformer_jax.config.data import DataConfig
from megatransformer_jax.config.layers import AttentionConfig
from megatransformer_jax.config.loop import MeshConfig, TrainConfig
from megatransformer_jax.config.model import MlpConfig, ModelConfig
from megatransformer_jax.config.recurrence import RecurrenceConfig
from megatransformer_jax.config.run import RunConfig
from megatransformer_jax.models.megatransformer import build_model
from megatransformer_jax.sharding.mesh import make_mesh, make_sharder
from megatransformer_jax.sharding.rules import Sharder
from megatransformer_jax.training.state import init_state, state_shardings
from megatransformer_jax.training.step import make_train_step
from megatransformer_jax.types import Batch, DTypePolicy

ROWS, LENGTH, VOCAB = 8, 16, 32
MESHES = {
    "data": MeshConfig(data=8),
    "fsdp": MeshConfig(data=2, fsdp=4),
    "tensor": MeshConfig(data=2, fsdp=2, tensor=2),
    "sequence": MeshConfig(data=2, fsdp=2, sequence=2),
    # More parts than key/value heads: keys are gathered where "sequence" exchanges heads.
    "keys": MeshConfig(fsdp=2, tensor=2, sequence=2),
}
# For single tests.
OTHER_MESHES = {
    "data and tensor": MeshConfig(data=4, tensor=2),
    "tensor of 4": MeshConfig(fsdp=2, tensor=4),
    "tensor and sequence": MeshConfig(data=2, tensor=2, sequence=2),
}
# Plain gradient descent with a large rate: a wrong gradient moves the parameters by as much.
OPTIMIZER = optax.sgd(1.0)


def run_config(draw_per="batch", accumulation=1):
    recurrence = RecurrenceConfig(
        mean_steps=4, backprop_depth=2, draw_per=draw_per, max_steps=8, state_init="normal"
    )
    model = ModelConfig(
        vocab_size=VOCAB,
        width=16,
        max_length=LENGTH,
        core_layers=1,
        attention=AttentionConfig(num_heads=4, num_kv_heads=2),
        mlp=MlpConfig(hidden_width=24),
        recurrence=recurrence,
    )
    data = DataConfig(source="reasoning", batch_size=ROWS, sequence_length=LENGTH)
    return RunConfig(model=model, data=data, train=TrainConfig(accumulation=accumulation))


def example_batch():
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, VOCAB, (ROWS, LENGTH)).astype(np.int32)
    segments = np.where(np.arange(LENGTH) < 9, 1, 2).astype(np.int32) * np.ones_like(tokens)
    positions = np.where(segments == 1, np.arange(LENGTH), np.arange(LENGTH) - 9).astype(np.int32)
    mask = (rng.random((ROWS, LENGTH)) < 0.8).astype(np.float32)
    return Batch(tokens, np.roll(tokens, -1, 1), mask, segments, positions)


@functools.cache
def single_device(config):
    model = build_model(config.model, DTypePolicy(), Sharder(), "cpu")
    state = jax.jit(lambda key: init_state(model, OPTIMIZER, key))(jax.random.key(0))
    return jax.jit(make_train_step(model, OPTIMIZER, config))(state, example_batch())


@functools.cache
def sharded(config, mesh_name, first_step=0):
    mesh = make_mesh((MESHES | OTHER_MESHES)[mesh_name], jax.devices())
    sharder = make_sharder(config.model, mesh)
    model = build_model(config.model, DTypePolicy(), sharder, "cpu")
    shardings = state_shardings(model, OPTIMIZER, sharder)
    init = jax.jit(lambda key: init_state(model, OPTIMIZER, key), out_shardings=shardings)
    state = init(jax.random.key(0))
    if first_step:
        state = state.replace(step=state.step + first_step)
    batch = jax.device_put(example_batch(), sharder.sharding("batch", "length"))
    step = jax.jit(make_train_step(model, OPTIMIZER, config), out_shardings=(shardings, None))
    compiled = step.lower(state, batch).compile()
    return compiled.as_text(), state, *compiled(state, batch)


def assert_equal_steps(config, mesh_name):
    expected_state, expected_metrics = single_device(config)
    _, _, state, metrics = sharded(config, mesh_name)
    for name, value in expected_metrics.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-5, atol=1e-5, err_msg=name)
    for (path, ours), theirs in zip(
        jax.tree_util.tree_leaves_with_path(state.params),
        jax.tree.leaves(expected_state.params),
        strict=True,
    ):
        name = jax.tree_util.keystr(path)
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5, err_msg=name)
