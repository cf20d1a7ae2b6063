"""A ramp that raises the depth of backpropagation too: each stage is a step of that depth."""

import dataclasses

import jax
import numpy as np
import optax
import pytest
from sharded_step import OPTIMIZER, example_batch, run_config, sharded

from megatransformer_jax.config.loop import TrainConfig
from megatransformer_jax.config.recurrence import RecurrenceConfig
from megatransformer_jax.config.run import RunConfig
from megatransformer_jax.models.core import backprop_stage, mean_at_step
from megatransformer_jax.models.megatransformer import build_model
from megatransformer_jax.sharding.rules import Sharder
from megatransformer_jax.training.state import init_state
from megatransformer_jax.training.step import make_train_step
from megatransformer_jax.types import DTypePolicy

RAMP = {"ramp": "doubling", "ramp_steps": 8, "ramp_backprop": True}
# Steps of the ramp and their loops.
STAGES = ((0, 1), (3, 1), (4, 2), (7, 2), (8, 4), (20, 4))


def changed(config, *, train=None, remat="none", **recurrence):
    recurrence = dataclasses.replace(config.model.recurrence, **recurrence)
    model = dataclasses.replace(config.model, recurrence=recurrence, remat=remat)
    return dataclasses.replace(config, model=model, train=train or config.train)


GROWING = changed(run_config(), backprop_depth=4, sampling="fixed", state_init="zero", **RAMP)


def build(config: RunConfig):
    model = build_model(config.model, DTypePolicy(), Sharder(), "cpu")
    return model, jax.jit(make_train_step(model, OPTIMIZER, config))


@pytest.fixture(scope="module")
def growing():
    model, step = build(GROWING)
    state = jax.jit(lambda key: init_state(model, OPTIMIZER, key))(jax.random.key(0))
    return state, step


def at_step(state, step):
    return state.replace(step=jax.numpy.int32(step))


def test_the_mean_doubles_in_equal_stages():
    recurrence = GROWING.model.recurrence
    assert [float(mean_at_step(recurrence, step)) for step, _ in STAGES] == [n for _, n in STAGES]
    uneven = RecurrenceConfig(mean_steps=12, ramp="doubling", ramp_from=3, ramp_steps=10)
    assert [float(mean_at_step(uneven, s)) for s in (0, 4, 5, 9, 10)] == [3, 3, 6, 6, 12]
    cut = RecurrenceConfig(mean_steps=6, ramp="doubling", ramp_steps=9)  # 1, 2, 4, then 6.
    assert [float(mean_at_step(cut, s)) for s in (2, 3, 6, 9)] == [1, 2, 4, 6]


def test_the_depths_are_powers_of_two_that_hold_the_share():
    def depths(**options):
        config = RecurrenceConfig(ramp="linear", ramp_steps=100, ramp_backprop=True, **options)
        reached = {int(backprop_stage(config, step)) for step in range(101)}
        assert reached == set(range(len(config.backprop_depths)))  # None is compiled in vain.
        for step in range(101):
            share = float(mean_at_step(config, step)) * config.backprop_depth / config.mean_steps
            assert config.backprop_depths[int(backprop_stage(config, step))] >= share - 1e-3
        return config.backprop_depths

    assert depths(mean_steps=8, backprop_depth=4) == (1, 2, 4)
    assert depths(mean_steps=12, backprop_depth=6, ramp_from=3) == (2, 4, 6)
    assert RecurrenceConfig(backprop_depth=4).backprop_depths == (4,)


@pytest.mark.parametrize(("step", "loops"), [(3, 1), (4, 2), (8, 4)])
def test_each_stage_is_the_step_of_its_depth(growing, step, loops):
    state, growing_step = growing
    state = at_step(state, step)
    new, metrics = growing_step(state, example_batch())
    assert float(metrics["num_steps"]) == loops
    fixed = changed(
        GROWING, mean_steps=loops, backprop_depth=loops, ramp="none", ramp_steps=0,
        ramp_backprop=False,
    )  # fmt: skip
    expected, _ = build(fixed)[1](state, example_batch())
    jax.tree.map(
        lambda ours, theirs: np.testing.assert_allclose(ours, theirs, atol=1e-6),
        new.params,
        expected.params,
    )
    moved = optax.tree.norm(optax.tree.sub(new.params, state.params))
    assert float(moved) > 1e-3


def test_one_program_holds_the_stages_and_takes_one(growing):
    state, step = growing
    lowered = step.lower(state, example_batch())
    assert "case" in lowered.as_text()
    for number, _ in STAGES:
        step(at_step(state, number), example_batch())
    assert step._cache_size() == 1


def test_micro_batches_groups_and_a_mesh_change_nothing(growing):
    state, plain_step = growing
    expected, _ = plain_step(at_step(state, 4), example_batch())
    grouped = changed(GROWING, train=TrainConfig(accumulation=2), remat="full", kept_every=2)
    results = [build(grouped)[1](at_step(state, 4), example_batch())[0]]
    results.append(sharded(GROWING, "fsdp", first_step=4)[2])
    for new in results:
        jax.tree.map(
            lambda ours, theirs: np.testing.assert_allclose(ours, theirs, atol=1e-5),
            new.params,
            expected.params,
        )
