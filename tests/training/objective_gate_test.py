"""The exit gate's term equals an explicit loop, in value and gradient, also when detached."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from megatransformer_jax.config.data import DataConfig
from megatransformer_jax.config.layers import AttentionConfig
from megatransformer_jax.config.loop import TrainConfig
from megatransformer_jax.config.model import MlpConfig, ModelConfig
from megatransformer_jax.config.recurrence import (
    ExitGateConfig,
    ExitGateTrainingConfig,
    RecurrenceConfig,
)
from megatransformer_jax.config.run import RunConfig
from megatransformer_jax.losses.tokens import token_loss
from megatransformer_jax.models.megatransformer import build_model, init_params
from megatransformer_jax.models.passes.observed import open_core
from megatransformer_jax.sharding.rules import Sharder
from megatransformer_jax.training.objective import Place, gate_steps, make_objective
from megatransformer_jax.types import Batch, DTypePolicy

ROWS, LENGTH, VOCAB, STEPS, WEIGHT, KL = 2, 4, 8, 3, 0.7, 0.2


def run_config(detach):
    model = ModelConfig(
        vocab_size=VOCAB,
        width=8,
        max_length=LENGTH,
        prelude_layers=0,
        core_layers=1,
        attention=AttentionConfig(num_heads=2),
        mlp=MlpConfig(hidden_width=8),
        recurrence=RecurrenceConfig(mean_steps=3, backprop_depth=1, state_init="zero"),
        exit_gate=ExitGateConfig(enabled=True),
    )
    gate = ExitGateTrainingConfig(
        weight=WEIGHT,
        kl_weight=KL,
        prior="geometric",
        prior_mean=2.0,
        max_steps=STEPS,
        detach=detach,
    )
    data = DataConfig(source="reasoning", batch_size=ROWS, sequence_length=LENGTH)
    return RunConfig(model=model, data=data, train=TrainConfig(exit_gate=gate))


def example():
    rng = np.random.default_rng(0)
    tokens = jnp.asarray(rng.integers(0, VOCAB, (ROWS, LENGTH)), jnp.int32)
    mask = jnp.asarray([[1, 1, 0, 1], [0, 1, 1, 1]], jnp.float32)
    positions = jnp.broadcast_to(jnp.arange(LENGTH), tokens.shape)
    return Batch(tokens, jnp.roll(tokens, -1, 1), mask, jnp.ones_like(tokens), positions)


def explicit_parts(model, params, batch, config):
    """The loss at the drawn depth and the gate's term, iteration by iteration, as [2]."""
    inputs = {"positions": batch.positions, "segment_ids": batch.segment_ids}
    depth = config.model.recurrence.backprop_depth

    def apply(*arguments, method):
        return model.apply({"params": params}, *arguments, method=method)

    core = open_core(model, params, batch.tokens, **inputs)
    state, there, expected, divergence = jnp.zeros((ROWS, LENGTH, 8)), 1.0, 0.0, 0.0
    for i in range(1, STEPS + 1):
        weights, prepared = core.params, core.prepared
        if i <= STEPS - depth:
            weights, prepared = jax.lax.stop_gradient((weights, prepared))
        state = core.core.apply({"params": weights}, state, prepared, core.context)
        logits = apply(apply(state, core.outer, method="run_coda")[1], method="run_head")
        stop = jax.nn.sigmoid(apply(state, method="run_gate"))
        p = there * (stop if i < STEPS else 1.0)
        there = there * (1 - stop)
        prior = 0.5 ** min(i, STEPS - 1)
        chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), batch.targets[..., None], -1)
        expected += jnp.sum(p * -chosen[..., 0] * batch.loss_mask)
        divergence += jnp.sum(p * jnp.log(p / prior) * batch.loss_mask)
    output = model.apply(
        {"params": params}, batch.tokens, num_steps=STEPS, backprop_depth=depth, **inputs
    )
    own = token_loss(output.logits, batch.targets, batch.loss_mask).cross_entropy
    return jnp.array([own, WEIGHT * (expected + KL * divergence)]) / jnp.sum(batch.loss_mask)


def test_value_and_gradient_equal_an_explicit_loop_and_detached_train_the_gate_alone():
    config, batch = run_config(detach=False), example()
    model = build_model(config.model, DTypePolicy(), Sharder(), "cpu")
    params = init_params(model, jax.random.key(0))
    # Off its start, where the gate says the same of all states and no gradient reaches them.
    params["exit_gate"]["weight"] = jax.random.normal(jax.random.key(1), (8,))

    def explicit(params):
        parts = explicit_parts(model, params, batch, config)
        return parts, parts

    by_part, parts = jax.jit(jax.jacrev(explicit, has_aux=True))(params)
    place = Place(jnp.int32(0), jnp.sum(batch.loss_mask), 1.0)
    rest = jnp.int32(STEPS), jax.random.key(2), place
    for detach in (False, True):
        objective = make_objective(model, run_config(detach))
        differentiate = jax.jit(jax.value_and_grad(objective, has_aux=True))
        (share, sums), gradients = differentiate(params, batch, *rest)
        np.testing.assert_allclose(share, jnp.sum(parts), rtol=1e-5)
        for (path, ours), wanted in zip(
            jax.tree_util.tree_leaves_with_path(gradients), jax.tree.leaves(by_part), strict=True
        ):
            name = jax.tree_util.keystr(path)
            is_free = detach and "exit_gate" not in name
            wanted = wanted[0] if is_free else wanted.sum(0)
            np.testing.assert_allclose(ours, wanted, rtol=1e-4, atol=1e-6, err_msg=name)
        assert np.any(np.asarray(gradients["exit_gate"]["weight"]) != 0)
    terms = sums.terms
    assert set(terms) == {"exit_expected_loss", "exit_kl", "exit_entropy", "exit_mean_steps"}
    term = WEIGHT * (terms["exit_expected_loss"] + KL * terms["exit_kl"])
    np.testing.assert_allclose(term, parts[1], rtol=1e-5)
    assert 1 < terms["exit_mean_steps"] < STEPS
    # Micro-batches add up, terms too.
    by_row = jax.jit(objective)
    shares, row_sums = zip(
        *(
            by_row(params, jax.tree.map(lambda a, row=row: a[row : row + 1], batch), *rest)
            for row in range(ROWS)
        ),
        strict=True,
    )
    np.testing.assert_allclose(sum(shares), share, rtol=1e-5)
    for name, value in terms.items():
        added = sum(sums.terms[name] for sums in row_sums)
        np.testing.assert_allclose(added, value, rtol=1e-5, err_msg=name)


def test_twice_the_mean_depth_unless_told():
    config = run_config(detach=False)
    assert gate_steps(config) == STEPS
    gate = dataclasses.replace(config.train.exit_gate, max_steps=None)
    train = dataclasses.replace(config.train, exit_gate=gate)
    assert gate_steps(dataclasses.replace(config, train=train)) == 6
