"""Every optimiser lowers a tiny model's loss, is saved and restored to the bit, and is sharded.

The gradients come from one compiled function for all of them, so that only updates are compiled
again.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from megatransformer_jax.checkpoints.manager import CheckpointManager
from megatransformer_jax.config.data import DataConfig
from megatransformer_jax.config.layers import AttentionConfig
from megatransformer_jax.config.loop import CheckpointConfig, MeshConfig, TrainConfig
from megatransformer_jax.config.model import MlpConfig, ModelConfig
from megatransformer_jax.config.optimizer import AdafactorConfig, GrokfastConfig, OptimizerConfig
from megatransformer_jax.config.recurrence import RecurrenceConfig
from megatransformer_jax.config.run import RunConfig
from megatransformer_jax.losses.tokens import token_loss
from megatransformer_jax.models.megatransformer import build_model, init_params
from megatransformer_jax.sharding.mesh import make_mesh
from megatransformer_jax.sharding.rules import Sharder
from megatransformer_jax.training.evaluation_params import (
    evaluation_params,
    restore_evaluation_params,
)
from megatransformer_jax.training.optimizers import build_optimizer
from megatransformer_jax.training.state import TrainState, state_shardings
from megatransformer_jax.types import DTypePolicy

MODEL = ModelConfig(
    vocab_size=16,
    width=8,
    max_length=256,
    prelude_layers=0,
    core_layers=1,
    coda_layers=0,
    attention=AttentionConfig(num_heads=2),
    mlp=MlpConfig(hidden_width=8),
    recurrence=RecurrenceConfig(mean_steps=2, backprop_depth=2, max_steps=4, state_init="zero"),
)
CASES = {
    "adafactor": {"name": "adafactor", "adafactor": AdafactorConfig(min_factored_size=4)},
    "lion": {"name": "lion"},
    "sgd": {"name": "sgd", "learning_rate": 0.3},
    "schedule_free_adamw": {"name": "schedule_free_adamw"},
    "grokfast_ema": {"grokfast": GrokfastConfig(filter="ema", alpha=0.5)},
    "ema": {"ema_decay": 0.9},
    "muon_grokfast_ma_and_ema": {
        "name": "muon", "grokfast": GrokfastConfig(filter="ma", window=3), "ema_decay": 0.9,
    },
}  # fmt: skip
# Sharded cases, and how many arrays with a matrix's axes they keep of each: adafactor none; z and
# a moment; two moments and the filter's average; momentum, ring and average.
WHOLE_COPIES = {
    "adafactor": 0,
    "schedule_free_adamw": 2,
    "grokfast_ema": 3,
    "muon_grokfast_ma_and_ema": 3,
}
STEPS, SAVED_AFTER = 10, 4


def run_config(case):
    options = {"learning_rate": 0.02, "schedule": "constant", "warmup_steps": 2, **CASES[case]}
    train = TrainConfig(steps=STEPS, ema_decay=options.pop("ema_decay", None))
    data = DataConfig(source="reasoning", batch_size=2)
    return RunConfig(model=MODEL, data=data, optimizer=OptimizerConfig(**options), train=train)


class Run:
    """A state and its steps, on one device or on a mesh."""

    def __init__(self, case, params, gradient, mesh=None):
        config = run_config(case)
        self.config = config
        self.gradient = gradient
        self.optimizer = build_optimizer(
            config.optimizer, config.train.steps, config.train.ema_decay
        )
        self.model = build_model(MODEL, DTypePolicy(), Sharder(mesh), "cpu")
        here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        shardings = here
        if mesh is not None:
            shardings = state_shardings(self.model, self.optimizer, Sharder(mesh))
        zero, key = np.int32(0), np.zeros(2, np.uint32)
        state = TrainState(zero, params, self.optimizer.init(params), key, zero, zero)
        self.state = jax.device_put(host(state), shardings)

        def update(state, gradients):
            updates, opt_state = self.optimizer.update(gradients, state.opt_state, state.params)
            params = optax.apply_updates(state.params, updates)
            return state.replace(step=state.step + 1, params=params, opt_state=opt_state)

        self.update = jax.jit(update, out_shardings=shardings)

    def step(self, state):
        gradients = self.gradient(host(state.params))[1]
        return self.update(state, jax.device_put(gradients, sharding_of(state.params)))

    def loss(self, params):
        return float(self.gradient(host(params))[0])


def sharding_of(tree):
    return jax.tree.map(lambda leaf: leaf.sharding, tree)


def host(tree):
    return jax.tree.map(np.array, jax.device_get(tree))


def assert_same_bits(left, right):
    jax.tree.map(np.testing.assert_array_equal, host(left), host(right))


@pytest.fixture(scope="module")
def params():
    model = build_model(MODEL, DTypePolicy(), Sharder(), "cpu")
    return init_params(model, jax.random.key(0))


@pytest.fixture(scope="module")
def gradient():
    """Loss and its gradients on one batch of a pattern that repeats."""
    model = build_model(MODEL, DTypePolicy(), Sharder(), "cpu")
    tokens = jnp.asarray((np.arange(16).reshape(2, 8) * 3) % 16, jnp.int32)

    def loss(params):
        output = model.apply({"params": params}, tokens, num_steps=jnp.int32(2), backprop_depth=2)
        sums = token_loss(output.logits, jnp.roll(tokens, -1, 1), jnp.ones(tokens.shape))
        return sums.cross_entropy / tokens.size

    return jax.jit(jax.value_and_grad(loss))


@pytest.fixture(scope="module")
def single(params, gradient):
    """The run of a case on one device, compiled once."""
    return functools.cache(lambda case: Run(case, params, gradient))


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(MeshConfig(data=2, fsdp=2, tensor=2), jax.devices())


@pytest.mark.parametrize("case", CASES)
def test_it_learns_and_goes_on_bit_for_bit_after_a_restart(case, single, tmp_path):
    run = single(case)
    checkpoints = CheckpointManager(tmp_path, CheckpointConfig())
    state = run.state
    for step in range(1, STEPS + 1):
        state = run.step(state)
        if step == SAVED_AFTER:
            checkpoints.save(step, state, {}, {"config": {}})
            judged = evaluation_params(state, run.config)
            checkpoints.wait()
    first = run.loss(run.state.params)
    assert run.loss(state.params) < first - 0.2
    assert run.loss(evaluation_params(state, run.config)) < first - 0.2

    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here), state
    )
    restored = checkpoints.restore(abstract, SAVED_AFTER).state
    for _ in range(STEPS - SAVED_AFTER):
        restored = run.step(restored)
    assert_same_bits(restored, state)

    loaded = restore_evaluation_params(checkpoints, SAVED_AFTER, run.model, run.config)
    assert_same_bits(loaded, judged)
    checkpoints.close()


@pytest.mark.parametrize("case", WHOLE_COPIES)
def test_a_sharded_step_equals_the_single_device_one(case, params, gradient, single, mesh):
    sharded = Run(case, params, gradient, mesh)
    ours, theirs = sharded.state, single(case).state
    for _ in range(2):
        ours, theirs = sharded.step(ours), single(case).step(theirs)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=2e-5), host(ours), host(theirs)
    )
    judged = evaluation_params(ours, sharded.config)
    for average, trained in zip(jax.tree.leaves(judged), jax.tree.leaves(ours.params), strict=True):
        assert average.sharding.is_equivalent_to(trained.sharding, trained.ndim)


@pytest.mark.parametrize("case", WHOLE_COPIES)
def test_arrays_with_a_parameters_shape_are_cut_as_it_is(case, params, gradient, mesh):
    state = Run(case, params, gradient, mesh).state
    count = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        name = jax.tree_util.keystr(path)
        if name.endswith("['mlp']['up']") and leaf.shape[-3:] == (8, 2, 8):
            cut = leaf.addressable_shards[0].data.shape
            assert cut == (*leaf.shape[:-3], 4, 2, 4), name
            count += 1
    assert count == 1 + WHOLE_COPIES[case]


@pytest.mark.parametrize("case", ["ema", "schedule_free_adamw"])
def test_an_average_is_not_the_parameters_that_are_trained(case, single):
    """Else it would prove nothing that what is loaded equals it."""
    run = single(case)
    state = run.step(run.step(run.state))
    judged = host(evaluation_params(state, run.config))["core"]["layers"]["layer_0"]["mlp"]["up"]
    trained = host(state.params)["core"]["layers"]["layer_0"]["mlp"]["up"]
    assert np.abs(judged - trained).max() > 1e-4
