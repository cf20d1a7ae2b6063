"""The train step: one program for every depth, flat memory, accumulation, skipped steps."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from megatransformer_jax.config.data import DataConfig
from megatransformer_jax.config.layers import AttentionConfig
from megatransformer_jax.config.loop import TrainConfig
from megatransformer_jax.config.model import MlpConfig, ModelConfig
from megatransformer_jax.config.recurrence import RecurrenceConfig
from megatransformer_jax.config.run import RunConfig
from megatransformer_jax.losses.tokens import token_loss
from megatransformer_jax.models.core import draw_num_steps
from megatransformer_jax.models.megatransformer import build_model
from megatransformer_jax.sharding.rules import Sharder
from megatransformer_jax.training.state import TrainState, init_state
from megatransformer_jax.training.step import make_train_step, update_state
from megatransformer_jax.training.transforms import average_weights
from megatransformer_jax.types import Batch, DTypePolicy

ROWS, LENGTH, VOCAB = 4, 8, 16


def run_config(train=None, model=None, **recurrence):
    recurrence = {"mean_steps": 4, "backprop_depth": 2, "state_init": "zero", **recurrence}
    config = ModelConfig(
        vocab_size=VOCAB,
        width=8,
        max_length=LENGTH,
        core_layers=1,
        attention=AttentionConfig(num_heads=2),
        mlp=MlpConfig(hidden_width=12),
        recurrence=RecurrenceConfig(**recurrence),
        **(model or {}),
    )
    data = DataConfig(source="reasoning", batch_size=ROWS, sequence_length=LENGTH)
    return RunConfig(model=config, data=data, train=TrainConfig(**(train or {})))


def example_batch(seed=0):
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, VOCAB, (ROWS, LENGTH)).astype(np.int32)
    mask = (rng.random((ROWS, LENGTH)) < 0.7).astype(np.float32)
    positions = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), tokens.shape)
    return Batch(tokens, np.roll(tokens, -1, 1), mask, np.ones_like(tokens), positions)


def build(config, optimizer=None):
    optimizer = optax.sgd(1.0) if optimizer is None else optimizer
    model = build_model(config.model, DTypePolicy(), Sharder(), "cpu")
    state = jax.jit(lambda key: init_state(model, optimizer, key))(jax.random.key(0))
    return model, state, jax.jit(make_train_step(model, optimizer, config))


def test_one_compilation_serves_every_drawn_depth():
    config = run_config(sampling="uniform", mean_steps=32, max_steps=64)
    _, state, step = build(config)
    depths = set()
    for seed in range(12):
        state, metrics = step(state, example_batch(seed))
        depths.add(float(metrics["num_steps"]))
        assert np.isfinite(metrics["loss"])
    assert len(depths) > 5
    assert step._cache_size() == 1


def test_one_compilation_serves_0_to_64_and_gradients_flow():
    config = run_config(sampling="fixed", state_init="normal")
    model, state, _ = build(config)
    batch = jax.tree.map(jnp.asarray, example_batch())

    @jax.jit
    def loss_and_norm(params, num_steps):
        def loss(params):
            output = model.apply(
                {"params": params},
                batch.tokens,
                num_steps=num_steps,
                backprop_depth=2,
                rngs={"state": jax.random.key(0)},
            )
            return token_loss(output.logits, batch.targets, batch.loss_mask).cross_entropy

        value, gradients = jax.value_and_grad(loss)(params)
        return value, optax.tree.norm(gradients["core"])

    results = [loss_and_norm(state.params, jnp.int32(n)) for n in range(65)]
    assert loss_and_norm._cache_size() == 1
    values, norms = np.array(results).T
    assert np.all(np.isfinite(values))
    assert norms[0] == 0
    assert np.all(norms[1:] > 0)
    assert len(set(values[:9].tolist())) == 9


@pytest.mark.parametrize("remat", ["none", "full"])
def test_compiled_memory_is_flat_in_depth(remat):
    def temporary_bytes(mean_steps, backprop_depth=4):
        config = run_config(
            model={"remat": remat},
            sampling="fixed",
            mean_steps=mean_steps,
            backprop_depth=backprop_depth,
            max_steps=128,
        )
        _, state, step = build(config)
        compiled = step.lower(state, example_batch()).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    # 4 and 64 iterations without gradient before the 4 with.
    assert temporary_bytes(4 + 4) == temporary_bytes(64 + 4)
    # The measurement does see what a longer backward pass costs.
    assert temporary_bytes(16, backprop_depth=16) > temporary_bytes(16)


def test_the_step_is_one_plain_gradient_step():
    config = run_config(train={"z_loss": 0.1}, sampling="fixed")
    model, state, step = build(config)
    batch = jax.tree.map(jnp.asarray, example_batch())

    def loss(params):
        output = model.apply(
            {"params": params}, batch.tokens, num_steps=jnp.int32(4), backprop_depth=2
        )
        sums = token_loss(output.logits, batch.targets, batch.loss_mask)
        return (sums.cross_entropy + 0.1 * sums.squared_log_normalizer) / sums.tokens

    value, gradients = jax.jit(jax.value_and_grad(loss))(state.params)
    new_state, metrics = step(state, batch)
    np.testing.assert_allclose(metrics["loss"], value, rtol=1e-5)
    np.testing.assert_allclose(metrics["grad_norm"], optax.tree.norm(gradients), rtol=1e-4)
    jax.tree.map(
        lambda new, old, g: np.testing.assert_allclose(new, old - g, rtol=0, atol=1e-5),
        new_state.params,
        state.params,
        gradients,
    )
    assert int(new_state.step) == 1
    assert metrics["tokens"] == batch.loss_mask.sum()


# Rows settle on their own, so that it does not matter which of them share a micro-batch.
SETTLING = {"gradient": "implicit", "implicit_tolerance": 0.1, "max_steps": 8}


@pytest.mark.parametrize(
    "recurrence",
    [
        {"draw_per": "batch"},
        {"draw_per": "sequence"},
        {"draw_per": "token"},
        {"draw_per": "sequence", **SETTLING},
    ],
)
def test_accumulated_micro_batches_equal_one_batch(recurrence):
    whole = run_config(**recurrence)
    parts = run_config(**recurrence, train={"accumulation": 2})
    _, state, step = build(whole)
    expected, expected_metrics = step(state, example_batch())
    ours, metrics = build(parts)[2](state, example_batch())
    for name, value in expected_metrics.items():
        np.testing.assert_allclose(metrics[name], value, rtol=2e-5, err_msg=name)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5),
        ours.params,
        expected.params,
    )


def test_a_non_finite_step_is_skipped_and_counted():
    config = run_config()
    _, state, step = build(config, average_weights(optax.adam(1e-2), 0.9))
    state, _ = step(state, example_batch())
    params = state.params
    broken = params["final_norm"]["scale"].at[0].set(jnp.nan)
    bad = state.replace(params={**params, "final_norm": {"scale": broken}})
    bad, metrics = step(bad, example_batch())
    assert not np.isfinite(metrics["loss"])
    assert (int(bad.step), int(bad.skipped_steps), int(bad.skipped_in_row)) == (2, 1, 1)
    jax.tree.map(np.testing.assert_array_equal, bad.opt_state, state.opt_state)
    np.testing.assert_array_equal(
        bad.params["coda"]["layer_0"]["mlp"]["down"], params["coda"]["layer_0"]["mlp"]["down"]
    )
    healed, metrics = step(bad.replace(params=params), example_batch())
    assert np.isfinite(metrics["loss"])
    assert (int(healed.skipped_steps), int(healed.skipped_in_row)) == (1, 0)


@pytest.mark.parametrize("loss, gradient", [(1.0, np.inf), (np.nan, 1.0), (1.0, 1.0)])
def test_loss_and_gradients_must_both_be_finite(loss, gradient):
    optimizer = optax.sgd(0.5, momentum=0.9)
    params = {"a": jnp.ones(2), "b": jnp.ones(())}
    state = TrainState(
        step=jnp.int32(3),
        params=params,
        opt_state=optimizer.init(params),
        key_data=jax.random.key_data(jax.random.key(0)),
        skipped_steps=jnp.int32(5),
        skipped_in_row=jnp.int32(2),
    )
    gradients = {"a": jnp.array([1.0, gradient]), "b": jnp.ones(())}
    new, metrics = update_state(state, gradients, jnp.float32(loss), optimizer)
    is_bad = not np.isfinite(loss + gradient)
    assert int(new.step) == 4
    assert (int(new.skipped_steps), int(new.skipped_in_row)) == ((6, 3) if is_bad else (5, 0))
    assert float(metrics["skipped_in_row"]) == float(new.skipped_in_row)
    np.testing.assert_array_equal(new.params["b"], 1.0 if is_bad else 0.5)
    for moved in jax.tree.leaves(new.opt_state):
        np.testing.assert_array_equal(moved, np.zeros_like(moved) if is_bad else 1.0)


def test_randomness_depends_on_seed_and_step_only():
    """The draw that the step makes can be made outside, and differs between steps."""
    config = run_config(sampling="uniform", mean_steps=8, max_steps=16)
    _, state, step = build(config)
    seen = []
    for number in range(4):
        keys = jax.random.split(jax.random.fold_in(state.key(), number))
        expected = draw_num_steps(config.model.recurrence, keys[0], number, ROWS, LENGTH)
        state, metrics = step(state, example_batch(number))
        assert float(metrics["num_steps"]) == float(expected)
        seen.append(int(expected))
    assert len(set(seen)) > 1


def test_a_donated_state_can_be_stepped():
    config = run_config()
    model = build_model(config.model, DTypePolicy(), Sharder(), "cpu")
    step = jax.jit(make_train_step(model, optax.sgd(1.0), config), donate_argnums=0)
    eager = init_state(model, optax.sgd(1.0), jax.random.key(0))
    for _ in range(2):
        eager, _ = step(eager, example_batch())
    assert int(eager.step) == 2
