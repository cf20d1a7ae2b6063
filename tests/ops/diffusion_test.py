"""Steps of a diffusion: conversions there and back, weights, DDPM and DDIM, thresholding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from megatransformer_jax.ops.diffusion import (
    PREDICTIONS,
    add_noise,
    ddim_step,
    ddpm_step,
    dynamic_threshold,
    implied_noise,
    min_snr_weight,
    predicted_clean,
    prediction_target,
)

CLEAN, NOISE, FRESH = jax.random.normal(jax.random.key(0), (3, 4, 3, 2))
ALPHA_BAR = jnp.array([0.99, 0.6, 0.2, 0.01])


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_target_means_the_clean_medium(prediction):
    noisy = add_noise(CLEAN, NOISE, ALPHA_BAR)
    np.testing.assert_allclose(
        noisy[1], np.sqrt(0.6) * CLEAN[1] + np.sqrt(0.4) * NOISE[1], rtol=1e-5
    )
    target = prediction_target(prediction, CLEAN, NOISE, ALPHA_BAR)
    clean = predicted_clean(prediction, target, noisy, ALPHA_BAR)
    np.testing.assert_allclose(clean, CLEAN, atol=1e-5)
    np.testing.assert_allclose(implied_noise(clean, noisy, ALPHA_BAR), NOISE, atol=1e-4)


def test_velocity_is_its_formula():
    v = prediction_target("v", CLEAN, NOISE, ALPHA_BAR)
    np.testing.assert_allclose(v[2], np.sqrt(0.2) * NOISE[2] - np.sqrt(0.8) * CLEAN[2], rtol=1e-5)


def test_min_snr_weighs_the_clean_mediums_error():
    """The squared error of a prediction is a known multiple of that of the clean medium."""
    snr = ALPHA_BAR / (1 - ALPHA_BAR)
    wanted = np.minimum(snr, 5.0)
    np.testing.assert_allclose(min_snr_weight("epsilon", ALPHA_BAR, 5.0) * snr, wanted, rtol=1e-5)
    np.testing.assert_allclose(min_snr_weight("v", ALPHA_BAR, 5.0) * (snr + 1), wanted, rtol=1e-5)
    at_clean = jnp.ones(1)
    assert min_snr_weight("epsilon", at_clean, 5.0) == min_snr_weight("v", at_clean, 5.0) == 0


def test_ddim_with_eta_1_is_the_ancestral_step():
    noisy = add_noise(CLEAN, NOISE, ALPHA_BAR)
    # Of what the network predicts, not of the truth.
    clean = jnp.tanh(CLEAN + 0.1)
    for share in (1.2, 4.0):
        next_alpha_bar = jnp.minimum(ALPHA_BAR * share, 0.995)
        arguments = clean, noisy, FRESH, ALPHA_BAR, next_alpha_bar
        np.testing.assert_allclose(
            ddim_step(*arguments, eta=1.0), ddpm_step(*arguments), rtol=1e-3, atol=2e-4
        )


def test_ddim_without_noise_follows_its_formula():
    noisy = add_noise(CLEAN, NOISE, ALPHA_BAR)
    later = jnp.sqrt(ALPHA_BAR)
    stepped = ddim_step(CLEAN, noisy, FRESH, ALPHA_BAR, later, eta=0.0)
    np.testing.assert_allclose(stepped, add_noise(CLEAN, NOISE, later), atol=2e-4)


@pytest.mark.parametrize("step", [ddpm_step, lambda *args: ddim_step(*args, eta=0.5)])
def test_the_last_step_gives_the_clean_medium(step):
    noisy = add_noise(CLEAN, NOISE, ALPHA_BAR)
    np.testing.assert_allclose(step(CLEAN, noisy, FRESH, ALPHA_BAR, jnp.ones(4)), CLEAN, atol=1e-6)


@pytest.mark.parametrize("quantile", [0.5, 1.0])
def test_dynamic_threshold_equals_numpy(quantile):
    media = 3 * np.asarray(jax.random.normal(jax.random.key(1), (3, 5, 4)), np.float32)
    media[2] *= 0.1
    lengths = np.array([5, 3, 4])
    is_valid = (np.arange(5) < lengths[:, None])[..., None]
    threshold = jax.jit(dynamic_threshold, static_argnums=1)
    ours = threshold(jnp.asarray(media), quantile, jnp.asarray(is_valid))
    whole = threshold(jnp.asarray(media), quantile)
    for row, length in enumerate(lengths):
        limit = max(np.quantile(np.abs(media[row, :length]), quantile), 1)
        wanted = np.clip(media[row, :length], -limit, limit) / limit
        np.testing.assert_allclose(ours[row, :length], wanted, rtol=1e-5)
        limit = max(np.quantile(np.abs(media[row]), quantile), 1)
        np.testing.assert_allclose(
            whole[row], np.clip(media[row], -limit, limit) / limit, rtol=1e-5
        )
    np.testing.assert_array_equal(whole[2], media[2])


def test_nothing_valid_is_finite():
    none = dynamic_threshold(jnp.ones((1, 2, 2)), 0.9, jnp.zeros((1, 2, 1), bool))
    assert np.all(np.isfinite(none))


def test_unknown_prediction_is_an_error():
    with pytest.raises(ValueError, match="unknown prediction 'x'"):
        prediction_target("x", CLEAN, NOISE, ALPHA_BAR)
    with pytest.raises(ValueError, match="unknown prediction 'x'"):
        predicted_clean("x", CLEAN, NOISE, ALPHA_BAR)
    with pytest.raises(ValueError, match="unknown prediction 'x'"):
        min_snr_weight("x", ALPHA_BAR, 5.0)
