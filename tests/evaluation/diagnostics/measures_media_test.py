"""Diagnostics of a model with images and sound, against passes over the same rows."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_media_model import CONFIG, LENGTH, tiny_media_batch, tiny_media_model, tiny_media_run

from megatransformer_jax.config.loop import DIAGNOSTIC_KINDS, DiagnosticsConfig, TrainConfig
from megatransformer_jax.config.recurrence import ExitGateConfig, StabilityConfig
from megatransformer_jax.evaluation.diagnostics.kinds import (
    Diagnoser,
    Moment,
    finite_scalars,
    kinds_of,
    make_subject,
)
from megatransformer_jax.models.megatransformer import LAST_STATE, init_params
from megatransformer_jax.sharding.rules import Sharder

DEPTH, PLACES = 2, LENGTH + 2 * 4 + 2 * 2
# Places of media in the rows of `tiny_media_batch`.
MEDIA = [[2, 3, 4, 5, 9, 10], [1, 2, 5, 6, 7, 8, 10, 11, 12, 13]]


@pytest.fixture(scope="module")
def subject():
    run = tiny_media_run(
        8,
        dataclasses.replace(CONFIG, exit_gate=ExitGateConfig(enabled=True)),
        ("text=2",),
        train=TrainConfig(stability=StabilityConfig(jacobian_weight=0.5)),
        diagnostics=DiagnosticsConfig(every_steps=1, num_rows=2),
    )
    return make_subject(run, tiny_media_model(run.model), tiny_media_batch(4), Sharder())


@pytest.fixture(scope="module")
def params(subject):
    return jax.jit(lambda key: init_params(subject.model, key))(jax.random.key(0))


@pytest.fixture(scope="module")
def measured(subject, params):
    diagnoser = Diagnoser(subject, kinds_of(subject))
    moment = Moment(params, np.asarray(jax.random.key_data(jax.random.key(1))), 3, 0)
    arrays = diagnoser.measure(moment)
    return arrays, diagnoser.present(arrays, moment)


@pytest.fixture(scope="module")
def states(subject, params):
    """The core's states of the rows after 0, 1, 2 and 3 iterations, from whole passes."""

    def after(num_steps):
        rows = subject.rows
        _, sown = subject.model.apply(
            {"params": params},
            rows.tokens,
            segment_ids=rows.segment_ids,
            num_steps=num_steps,
            media=rows.media,
            mutable=[LAST_STATE],
        )
        return sown[LAST_STATE]["state"][0]

    compiled = jax.jit(after)
    return np.stack([compiled(jnp.int32(num_steps)) for num_steps in range(4)])


def test_all_kinds_are_made_of_places_with_media(measured):
    _, findings = measured
    assert tuple(findings) == DIAGNOSTIC_KINDS
    scalars = finite_scalars(findings)
    for part in ("image_decoder", "image_prelude/layers/layer_0", "audio_decoder"):
        assert scalars[f"gradient_norm/media/{part}"] > 0
    # The objective has its other terms too.
    assert scalars["gradient_norm/exit_gate"] > 0
    assert scalars["spectral_radius"] > 0
    # Of every place one draw per sequence would not tell; the mean is that of three steps.
    assert 1 <= scalars["mean_drawn_steps"] <= 8


def test_residuals_are_those_of_whole_passes(measured, states):
    is_place = np.zeros((2, PLACES), bool)
    is_place[0, : 7 + 4 + 2] = is_place[1, : 6 + 2 + 4 + 4] = True
    states = np.where(is_place[..., None], states, 0)
    size = lambda x: np.sqrt(np.sum(x**2, axis=(1, 2)))  # noqa: E731
    wanted = np.mean(size(states[2] - states[1]) / size(states[2]))
    np.testing.assert_allclose(measured[0]["recurrence"]["residual"][1], wanted, rtol=1e-4)


def test_states_of_the_core_count_media_and_those_of_the_text_do_not(measured, states):
    summaries = measured[0]["layer_states"]
    assert np.sum(summaries.outer["prelude/layer_0"].is_token) == (7 + 6) * CONFIG.width
    core = summaries.core["core/layer_0"]
    assert np.sum(core.is_token[0]) == (13 + 16) * CONFIG.width
    if not CONFIG.recurrence.iteration_norm:
        values = states[1][:, :16][np.arange(16) < np.array([[13], [16]])]
        np.testing.assert_allclose(core.rms[0], np.sqrt(np.mean(values**2)), rtol=1e-4)


def test_maps_show_media_to_the_core_and_not_to_the_text(measured):
    maps = measured[0]["attention_maps"]
    media, text = MEDIA[0], [0, 1, 6, 7, 8, 11, 12]
    prelude = maps["prelude/layer_0"]
    assert prelude.shape == (2, PLACES, PLACES)
    assert np.all(prelude[:, text][:, :, media] == 0)
    core = maps["core/layer_0/iteration_2"]
    np.testing.assert_allclose(core[:, : 7 + 4 + 2].sum(axis=-1), 1, rtol=1e-5)
    assert np.all(core[:, 12, :13] > 0)
