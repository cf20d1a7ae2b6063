"""Stability terms of the objective: their weights and warm-up, and nothing when they are off."""

import jax
import jax.numpy as jnp
import numpy as np

from megatransformer_jax.config.data import DataConfig
from megatransformer_jax.config.layers import AttentionConfig
from megatransformer_jax.config.loop import TrainConfig
from megatransformer_jax.config.model import MlpConfig, ModelConfig
from megatransformer_jax.config.recurrence import RecurrenceConfig, StabilityConfig
from megatransformer_jax.config.run import RunConfig
from megatransformer_jax.losses.tokens import token_loss
from megatransformer_jax.models.megatransformer import build_model, init_params
from megatransformer_jax.models.passes.observed import open_core, random_signs, squared_jacobian
from megatransformer_jax.sharding.rules import Sharder
from megatransformer_jax.training.objective import Place, make_objective
from megatransformer_jax.types import Batch, DTypePolicy

ROWS, LENGTH, VOCAB, WIDTH = 2, 4, 8, 8
KEY = jax.random.key(5)


def run_config(**stability):
    model = ModelConfig(
        vocab_size=VOCAB,
        width=WIDTH,
        max_length=LENGTH,
        prelude_layers=0,
        core_layers=1,
        attention=AttentionConfig(num_heads=2),
        mlp=MlpConfig(hidden_width=8),
        recurrence=RecurrenceConfig(mean_steps=3, backprop_depth=2, state_init="zero"),
    )
    data = DataConfig(source="reasoning", batch_size=ROWS, sequence_length=LENGTH)
    train = TrainConfig(stability=StabilityConfig(**stability))
    return RunConfig(model=model, data=data, train=train)


def example():
    rng = np.random.default_rng(0)
    tokens = jnp.asarray(rng.integers(0, VOCAB, (ROWS, LENGTH)), jnp.int32)
    mask = jnp.asarray([[1, 1, 0, 1], [0, 1, 1, 1]], jnp.float32)
    positions = jnp.broadcast_to(jnp.arange(LENGTH), tokens.shape)
    return Batch(tokens, jnp.roll(tokens, -1, 1), mask, jnp.ones_like(tokens), positions)


def evaluated(config, params, step, num_steps=3):
    model = build_model(config.model, DTypePolicy(), Sharder(), "cpu")
    batch = example()
    place = Place(step, jnp.sum(batch.loss_mask), 1.0)
    num_steps = jnp.asarray(num_steps, jnp.int32)
    return make_objective(model, config)(params, batch, num_steps, KEY, place)


def test_the_penalty_is_added_with_its_weight_and_warms_up():
    config = run_config(jacobian_weight=0.5, jacobian_warmup_steps=10)
    model = build_model(config.model, DTypePolicy(), Sharder(), "cpu")
    params, batch = init_params(model, jax.random.key(0)), example()
    run = jax.jit(lambda params, step: evaluated(config, params, step))
    share, sums = run(params, jnp.int32(0))
    tokens = sums.tokens.tokens
    np.testing.assert_allclose(share, sums.tokens.cross_entropy / tokens, rtol=1e-6)
    penalty = sums.terms["jacobian_penalty"]
    for step, factor in ((5, 0.25), (10, 0.5), (99, 0.5)):
        warmed, _ = run(params, jnp.int32(step))
        np.testing.assert_allclose(warmed - share, factor * penalty, rtol=1e-4)

    @jax.jit
    def wanted(params):
        _, sown = model.apply(
            {"params": params},
            batch.tokens,
            num_steps=3,
            positions=batch.positions,
            segment_ids=batch.segment_ids,
            mutable=["last_state"],
        )
        probe = random_signs(jax.random.fold_in(KEY, 3), batch.loss_mask, WIDTH)
        core = open_core(
            model,
            params,
            batch.tokens,
            positions=batch.positions,
            segment_ids=batch.segment_ids,
        )
        square = squared_jacobian(core, sown["last_state"]["state"][0], probe, jnp.int32(3))
        return square / jnp.sum(probe**2)

    np.testing.assert_allclose(penalty, wanted(params), rtol=1e-5)


DRAWS = np.array([[1, 2, 3, 4], [5, 1, 2, 1]])


def test_the_fixed_point_loss_is_what_the_last_iteration_moves_by():
    """Against a state kept from every iteration. Draws per token; masked tokens and those of one
    iteration are left out, and gradients leave the size alone."""
    config = run_config(fixed_point_weight=0.5, fixed_point_warmup_steps=10)
    model = build_model(config.model, DTypePolicy(), Sharder(), "cpu")
    params, batch = init_params(model, jax.random.key(0)), example()
    keeps = batch.loss_mask * (DRAWS > 1)

    def penalty(params):
        core = open_core(
            model,
            params,
            batch.tokens,
            positions=batch.positions,
            segment_ids=batch.segment_ids,
        )
        states = [jnp.zeros_like(core.injected)]
        for step in range(DRAWS.max()):
            truncated = core if step >= DRAWS.max() - 2 else core.stopped()
            joined = (step >= DRAWS.max() - DRAWS)[..., None]
            states.append(jnp.where(joined, truncated.iterate(states[-1], step), states[-1]))
        moved = jnp.sum((states[-1] - states[-2]) ** 2, -1)
        size = jnp.sum(jax.lax.stop_gradient(states[-1]) ** 2, -1)
        return jnp.sum(keeps * moved / size) / jnp.sum(batch.loss_mask)

    def added(params):
        share, sums = evaluated(config, params, jnp.int32(5), DRAWS)
        text = sums.tokens.cross_entropy / sums.tokens.tokens
        return share - text, sums.terms["fixed_point_penalty"]

    differentiate = jax.jit(jax.value_and_grad(added, has_aux=True))
    (share, metric), gradient = differentiate(params)
    wanted, wanted_gradient = jax.jit(jax.value_and_grad(penalty))(params)
    np.testing.assert_allclose(metric, wanted, rtol=1e-5)
    np.testing.assert_allclose(share, 0.25 * wanted, rtol=1e-3)
    jax.tree.map(
        lambda ours, theirs: np.testing.assert_allclose(ours, 0.25 * theirs, rtol=1e-3, atol=1e-6),
        gradient,
        wanted_gradient,
    )


def test_without_terms_the_program_is_that_of_the_plain_loss():
    config = run_config()
    model = build_model(config.model, DTypePolicy(), Sharder(), "cpu")
    params = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))

    def plain(params, step):
        batch = example()
        num_tokens = jnp.sum(batch.loss_mask)
        state_key, dropout_key = jax.random.split(KEY)
        output = model.apply(
            {"params": params},
            batch.tokens,
            positions=batch.positions,
            segment_ids=batch.segment_ids,
            num_steps=jnp.int32(3),
            backprop_depth=2,
            deterministic=False,
            rngs={"state": state_key, "dropout": dropout_key},
        )
        sums = token_loss(output.logits, batch.targets, batch.loss_mask)
        weighted = sums.cross_entropy + 0.0 * sums.squared_log_normalizer
        return weighted / num_tokens, sums

    def ours(params, step):
        share, sums = evaluated(config, params, step)
        assert sums.terms == {}
        return share, sums.tokens

    def program(function):
        differentiate = jax.grad(function, has_aux=True)
        text = jax.jit(differentiate).lower(params, jnp.int32(0)).as_text()
        return text.replace(f"jit_{function.__name__}", "jit")

    assert program(ours) == program(plain)
