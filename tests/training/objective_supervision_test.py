"""A loss at every iteration, and the gate's target of gains, equal an explicit loop."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from megatransformer_jax.config.data import DataConfig
from megatransformer_jax.config.layers import AttentionConfig
from megatransformer_jax.config.loop import TrainConfig
from megatransformer_jax.config.model import MlpConfig, ModelConfig
from megatransformer_jax.config.option import ConfigError
from megatransformer_jax.config.recurrence import (
    ExitGateConfig,
    ExitGateTrainingConfig,
    RecurrenceConfig,
    SupervisionConfig,
)
from megatransformer_jax.config.run import RunConfig
from megatransformer_jax.losses.tokens import token_loss
from megatransformer_jax.models.megatransformer import build_model, init_params
from megatransformer_jax.models.passes.observed import open_core
from megatransformer_jax.sharding.rules import Sharder
from megatransformer_jax.training.objective import Place, make_objective
from megatransformer_jax.types import Batch, DTypePolicy

ROWS, LENGTH, VOCAB, STEPS, Z_LOSS = 2, 4, 8, 3, 0.1
# Geometric of mean 2, cut at 3 iterations.
PRIOR = np.array([0.5, 0.25, 0.25])
MODEL = ModelConfig(
    vocab_size=VOCAB,
    width=8,
    max_length=LENGTH,
    prelude_layers=0,
    core_layers=1,
    attention=AttentionConfig(num_heads=2),
    mlp=MlpConfig(hidden_width=8),
    recurrence=RecurrenceConfig(
        mean_steps=STEPS, backprop_depth=2, state_init="zero", sampling="fixed"
    ),
)
DATA = DataConfig(source="reasoning", batch_size=ROWS, sequence_length=LENGTH)
RNG = np.random.default_rng(0)
TOKENS = jnp.asarray(RNG.integers(0, VOCAB, (ROWS, LENGTH)), jnp.int32)
MASK = jnp.asarray([[1, 1, 0, 1], [0, 1, 1, 1]], jnp.float32)
POSITIONS = jnp.broadcast_to(jnp.arange(LENGTH), TOKENS.shape)
BATCH = Batch(TOKENS, jnp.roll(TOKENS, -1, 1), MASK, jnp.ones_like(TOKENS), POSITIONS)
PLACE = Place(jnp.int32(0), jnp.sum(MASK), 1.0)


def supervised(mix=1.0, max_steps=None, model=MODEL):
    supervision = SupervisionConfig(prior="geometric", prior_mean=2.0, mix=mix, max_steps=max_steps)
    train = TrainConfig(z_loss=Z_LOSS, supervision=supervision)
    return RunConfig(model=model, data=DATA, train=train)


def each_iteration(model, params, depth):
    """Logits of every iteration; gradients reach the core from the last `depth` of them."""
    inputs = {"positions": BATCH.positions, "segment_ids": BATCH.segment_ids}
    core = open_core(model, params, BATCH.tokens, **inputs)
    state, states, scores = jnp.zeros((ROWS, LENGTH, 8)), [], []
    for i in range(STEPS):
        weights, prepared = core.params, core.prepared
        if i < STEPS - depth:
            weights, prepared = jax.lax.stop_gradient((weights, prepared))
        state = core.core.apply({"params": weights}, state, prepared, core.context)
        _, hidden = model.apply({"params": params}, state, core.outer, method="run_coda")
        scores.append(model.apply({"params": params}, hidden, method="run_head"))
        states.append(state)
    return states, scores


def weighted(logits):
    sums = token_loss(logits, BATCH.targets, MASK)
    return (sums.cross_entropy + Z_LOSS * sums.squared_log_normalizer) / jnp.sum(MASK)


def test_value_and_gradient_equal_an_explicit_loop_and_last_iterations_alone_train_the_core():
    model = build_model(MODEL, DTypePolicy(), Sharder(), "cpu")
    params = init_params(model, jax.random.key(0))

    def explicit(params):
        _, scores = each_iteration(model, params, depth=2)
        losses = jnp.stack([weighted(logits) for logits in scores])
        return jnp.stack([PRIOR @ losses, losses[-1]])

    wanted, by_part = jax.jit(lambda params: (explicit(params), jax.jacrev(explicit)(params)))(
        params
    )
    rest = BATCH, jnp.int32(STEPS), jax.random.key(2), PLACE
    for mix in (1.0, 0.3):
        objective = make_objective(model, supervised(mix))
        differentiate = jax.jit(jax.value_and_grad(objective, has_aux=True))
        (share, sums), gradients = differentiate(params, *rest)
        parts = np.array([mix, 1 - mix])
        np.testing.assert_allclose(share, parts @ wanted, rtol=1e-5)
        for (path, ours), both in zip(
            jax.tree_util.tree_leaves_with_path(gradients), jax.tree.leaves(by_part), strict=True
        ):
            name = jax.tree_util.keystr(path)
            expected = jnp.tensordot(parts, both, 1)
            np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-6, err_msg=name)
        # The run's loss and accuracy are those of the last iteration.
        own = (sums.tokens.cross_entropy + Z_LOSS * sums.tokens.squared_log_normalizer) / jnp.sum(
            MASK
        )
        np.testing.assert_allclose(own, wanted[1], rtol=1e-5)
        assert set(sums.terms) == {"supervised_loss"}
    by_row = [
        make_objective(model, supervised())(
            params, jax.tree.map(lambda leaf, row=row: leaf[row : row + 1], BATCH), *rest[1:]
        )[0]
        for row in range(ROWS)
    ]
    np.testing.assert_allclose(sum(by_row), wanted[0], rtol=1e-5)


def test_the_pass_has_dropout():
    config = dataclasses.replace(MODEL, residual_dropout_rate=0.5)
    model = build_model(config, DTypePolicy(), Sharder(), "cpu")
    params = init_params(model, jax.random.key(0))
    objective = jax.jit(make_objective(model, supervised(model=config)))
    keys = (jax.random.key(seed) for seed in (2, 2, 3))
    first, same, other = (objective(params, BATCH, jnp.int32(STEPS), key, PLACE) for key in keys)
    assert first[0] == same[0] != other[0]


def test_a_gate_learns_what_iterations_gain_and_nothing_else_learns_from_it():
    gated = dataclasses.replace(MODEL, exit_gate=ExitGateConfig(enabled=True))
    gate = ExitGateTrainingConfig(
        weight=0.7, target="gain", gain_slope=3.0, gain_threshold=0.1, max_steps=STEPS, detach=True
    )
    config = RunConfig(model=gated, data=DATA, train=TrainConfig(exit_gate=gate))
    model = build_model(gated, DTypePolicy(), Sharder(), "cpu")
    params = init_params(model, jax.random.key(0))
    params["exit_gate"]["weight"] = jax.random.normal(jax.random.key(1), (8,))
    states, scores = each_iteration(model, params, depth=2)
    losses = [
        -np.take_along_axis(np.asarray(jax.nn.log_softmax(x)), BATCH.targets[..., None], -1)[..., 0]
        for x in scores
    ]
    wanted = 0.0
    for before, now, state in zip(losses[:-1], losses[1:], states[1:], strict=True):
        logit = np.asarray(model.apply({"params": params}, state, method="run_gate"))
        stop = 1 / (1 + np.exp(-logit))
        goes_on = 1 / (1 + np.exp(-3.0 * (np.maximum(before - now, 0) - 0.1)))
        entropy = -(goes_on * np.log(1 - stop) + (1 - goes_on) * np.log(stop))
        wanted += np.sum(entropy * MASK) / np.sum(MASK) / (STEPS - 1)
    rest = BATCH, jnp.int32(STEPS), jax.random.key(2), PLACE
    objective = jax.jit(jax.value_and_grad(make_objective(model, config), has_aux=True))
    (share, sums), gradients = objective(params, *rest)
    np.testing.assert_allclose(sums.terms["exit_gain_loss"], wanted, rtol=1e-5)
    assert "exit_kl" not in sums.terms and 1 < sums.terms["exit_mean_steps"] < STEPS
    plain = make_objective(model, dataclasses.replace(config, model=MODEL, train=TrainConfig()))
    own, alone = jax.jit(jax.value_and_grad(lambda p: plain(p, *rest)[0]))(params)
    np.testing.assert_allclose(share, own + 0.7 * wanted, rtol=1e-5)
    assert np.any(np.asarray(gradients.pop("exit_gate")["weight"]) != 0)
    alone.pop("exit_gate")
    for ours, theirs in zip(jax.tree.leaves(gradients), jax.tree.leaves(alone), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-7)


def test_draws_of_depth_are_allowed_next_to_a_loss_at_every_iteration():
    recurrence = dataclasses.replace(MODEL.recurrence, sampling="uniform")
    model = dataclasses.replace(MODEL, recurrence=recurrence)
    assert supervised(0.5, max_steps=4, model=model).train.supervision.mix == 0.5
    with pytest.raises(ConfigError, match=r"sampling: 'uniform' needs a pass .* or lower mix"):
        supervised(model=model)
