"""The terms of exit gate, Jacobian and fixed point with images and sound, against whole passes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_media_model import CONFIG, tiny_media_batch, tiny_media_model, tiny_media_run

from megatransformer_jax import streams
from megatransformer_jax.config.loop import TrainConfig
from megatransformer_jax.config.recurrence import ExitGateConfig, ExitGateTrainingConfig
from megatransformer_jax.losses.tokens import (
    exit_log_probs,
    exit_loss,
    token_cross_entropy,
    uniform_log_prior,
)
from megatransformer_jax.models.megatransformer import LAST_STATE, init_params
from megatransformer_jax.models.passes.observed import random_signs
from megatransformer_jax.ops.interleave import take_places
from megatransformer_jax.training.objective import (
    Place,
    fixed_point_term,
    gate_term,
    jacobian_term,
)

STEPS, DEPTH, KEY = 3, 2, jax.random.key(7)
RUN = tiny_media_run(
    2,
    dataclasses.replace(CONFIG, exit_gate=ExitGateConfig(enabled=True)),
    train=TrainConfig(exit_gate=ExitGateTrainingConfig(max_steps=STEPS)),
)
BATCH = tiny_media_batch()


@pytest.fixture(scope="module")
def made():
    model = tiny_media_model(RUN.model)
    params = jax.jit(lambda key: init_params(model, key))(jax.random.key(0))
    # Gate and decoders start at zero, which would hide what they read.
    params = jax.tree.map(
        lambda leaf: leaf + 0.1 * jax.random.normal(jax.random.key(leaf.size), leaf.shape), params
    )
    return model, params


def whole_pass(made, num_steps, state=None):
    model, params = made
    output, sown = model.apply(
        {"params": params},
        BATCH.tokens,
        segment_ids=BATCH.segment_ids,
        num_steps=num_steps,
        state=state,
        media=BATCH.media,
        mutable=[LAST_STATE],
    )
    return output, sown[LAST_STATE]["state"][0]


def layout_of(made):
    model, params = made

    def lay_out(module):
        return module.media.layout(BATCH.media, BATCH.segment_ids)

    return model.apply({"params": params}, method=lay_out)


def test_the_gate_learns_from_the_text_between_media(made):
    model, params = made
    places = layout_of(made).text_places

    @jax.jit
    def of_iteration(num_steps):
        output, state = whole_pass(made, num_steps)
        gate = model.apply({"params": params}, take_places(state, places), method="run_gate")
        return token_cross_entropy(output.logits, BATCH.targets), gate

    each = [of_iteration(jnp.int32(number)) for number in range(1, STEPS + 1)]
    losses, gates = (jnp.stack(arrays) for arrays in zip(*each, strict=True))
    wanted = exit_loss(exit_log_probs(gates), losses, BATCH.loss_mask, uniform_log_prior(STEPS))

    @jax.jit
    def differentiate(gate):
        def loss(gate):
            sums, _ = gate_term(model, RUN, params | {"exit_gate": gate}, BATCH, KEY)
            return sums.divergence, sums

        return jax.value_and_grad(loss, has_aux=True)(gate)

    (_, found), gradient = differentiate(params["exit_gate"])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3), found, wanted)
    assert np.any(gradient["weight"])


def test_the_fixed_point_is_that_of_the_text_between_media(made):
    model, params = made
    places = layout_of(made).text_places

    @jax.jit
    def both():
        states = tuple(whole_pass(made, jnp.int32(number))[1] for number in (1, 2))
        place = Place(jnp.int32(0), jnp.sum(BATCH.loss_mask), 1.0)
        return states, fixed_point_term(model, params, BATCH, states, jnp.int32(2), place)

    states, term = both()
    previous, last = (np.asarray(take_places(state, places)) for state in states)
    counts = np.asarray(BATCH.loss_mask) > 0
    moved, size = (np.sum(array[counts] ** 2, -1) for array in (last - previous, last))
    np.testing.assert_allclose(term, np.mean(moved / size), rtol=1e-4)


def test_the_jacobian_is_that_of_one_more_iteration_over_all_places(made):
    """|J^T v|^2 with the dense J, whose columns at places of media are not zero."""
    model, params = made
    layout = layout_of(made)
    is_medium = np.asarray(layout.is_medium)
    mask = np.zeros(is_medium.shape, np.float32)
    for row, places in enumerate(np.asarray(layout.text_places)):
        for token in np.flatnonzero(BATCH.loss_mask[row]):
            mask[row, places[token]] = 1
    place = Place(jnp.int32(0), jnp.sum(BATCH.loss_mask), 1.0)

    @jax.jit
    def both(params):
        _, state = whole_pass((model, params), DEPTH)
        dense = jax.jacfwd(lambda state: whole_pass((model, params), 1, state)[1])(state)
        term = jacobian_term(model, params, BATCH, state, jnp.int32(DEPTH), KEY, place)
        key = jax.random.fold_in(KEY, streams.PROBE)
        probe = random_signs(key, jnp.asarray(mask), CONFIG.width)
        return term, jnp.einsum("bsd,bsdcte->cte", probe, dense), jnp.sum(probe**2)

    term, columns, size = both(params)
    np.testing.assert_allclose(term, np.sum(columns**2) / size, rtol=1e-3)
    assert np.all(np.any(columns[is_medium] != 0, axis=-1))
