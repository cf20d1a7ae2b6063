"""Loss, guidance and samplers of a diffusion, with networks whose answers are known exactly."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from megatransformer_jax.config.decoders import DiffusionConfig, SamplerConfig
from megatransformer_jax.models.media.decoder import (
    Condition,
    drop_conditions,
    guided,
    without_context,
)
from megatransformer_jax.models.media.diffusion import (
    diffusion_loss,
    limit,
    sample_diffusion,
    schedule_of,
)
from megatransformer_jax.ops.diffusion import implied_noise, per_medium

MEAN, STD = 0.5, 0.3
CONFIG = DiffusionConfig(num_times=20, prediction="epsilon", min_snr_gamma=None)
draw_jitted = jax.jit(sample_diffusion, static_argnums=(0, 1, 2, 4))
loss_jitted = jax.jit(diffusion_loss, static_argnums=(0, 1))


def conditions(count):
    context = jnp.arange(1.0, count + 1)[:, None, None] * jnp.ones((count, 2, 3))
    return Condition(context, jnp.ones((count, 2), bool))


def perfect_denoiser(config):
    """The noise expected of x_t where clean values are normal with MEAN and STD."""
    schedule = schedule_of(config)

    def denoise(noisy, time, condition):
        a = schedule.alpha_bar(time)
        wide = per_medium(a, noisy)
        gain = jnp.sqrt(wide) * STD**2 / (wide * STD**2 + 1 - wide)
        clean = MEAN + gain * (noisy - jnp.sqrt(wide) * MEAN)
        noise = implied_noise(clean, noisy, a)
        if config.prediction == "epsilon":
            return noise
        return jnp.sqrt(wide) * noise - jnp.sqrt(1 - wide) * clean

    return denoise


def test_samplers_agree_in_distribution_with_gaussian_data():
    """All steps: DDPM, DDIM with eta 1 and with eta 0 give the data's mean and spread."""
    config = dataclasses.replace(CONFIG, num_times=100, prediction="v")
    denoise, values, finals = perfect_denoiser(config), 4000, {}
    for sampler, eta in (("ddpm", 0.0), ("ddim", 1.0), ("ddim", 0.0)):
        settings = SamplerConfig(sampler=sampler, num_steps=100, eta=eta, threshold="none")
        drawn = draw_jitted(denoise, config, settings, conditions(2), (values,), jax.random.key(3))
        finals[sampler, eta] = np.asarray(drawn)
        # Four standard errors, and what a hundred steps lose.
        assert abs(drawn.mean() - MEAN) < 4 * STD / np.sqrt(2 * values) + 0.005
        assert abs(drawn.std() / STD - 1) < 4 / np.sqrt(4 * values) + 0.03
    np.testing.assert_allclose(finals["ddim", 1.0], finals["ddpm", 0.0], atol=2e-3)
    assert np.max(np.abs(finals["ddim", 0.0] - finals["ddpm", 0.0])) > 0.1


def test_a_medium_does_not_depend_on_its_mates_nor_on_padding():
    settings = SamplerConfig(sampler="ddpm", num_steps=5, threshold="dynamic")
    lengths = jnp.array([3, 5])

    def draw(count, frames):
        is_valid = (jnp.arange(frames) < lengths[:count, None])[..., None]
        return draw_jitted(
            perfect_denoiser(CONFIG),
            CONFIG,
            settings,
            conditions(count),
            (frames, 2),
            jax.random.key(0),
            is_valid=is_valid,
        )

    both, padded = draw(2, 5), draw(1, 9)
    np.testing.assert_allclose(padded[0, :3], both[0, :3], rtol=1e-5, atol=1e-6)
    assert np.all(padded[0, 3:] == 0)
    assert np.all(both[0, :3] != 0)
    assert np.max(np.abs(both[1, :3] - both[0, :3])) > 1e-2


def test_a_loss_does_not_depend_on_mates_nor_on_padding():
    def denoise(noisy, time, condition):
        return noisy * per_medium(time, noisy) + condition.context[:, :1, :1]

    media = jax.random.normal(jax.random.key(1), (2, 5, 2))
    lengths = jnp.array([3, 5])

    def terms(count, frames, fill):
        padded = jnp.pad(media[:count], ((0, 0), (0, frames - 5), (0, 0)))
        is_valid = (jnp.arange(frames) < lengths[:count, None])[..., None]
        return loss_jitted(
            denoise,
            DiffusionConfig(),
            jnp.where(is_valid, padded, fill),
            conditions(count),
            jax.random.key(0),
            is_valid=is_valid,
        )

    both, alone = terms(2, 5, 0.0), terms(1, 9, 7.0)
    for name, values in both.items():
        np.testing.assert_allclose(alone[name][0], values[0], rtol=1e-5)
        assert values[0] != values[1]


def test_the_loss_is_the_weighted_error_of_what_is_predicted():
    media = MEAN + STD * jax.random.normal(jax.random.key(1), (4000, 9))
    weighing = dataclasses.replace(CONFIG, min_snr_gamma=2.0)

    @jax.jit
    def losses(key):
        return [
            diffusion_loss(perfect_denoiser(config), config, media, conditions(4000), key)
            for config in (CONFIG, weighing)
        ]

    plain, weighted = losses(jax.random.key(0))
    np.testing.assert_array_equal(plain["loss"], plain["squared_error"])
    np.testing.assert_allclose(weighted["squared_error"], plain["squared_error"], rtol=1e-5)
    # The best there is: the variance of the noise given x_t, on average over times.
    a = schedule_of(CONFIG).alpha_bar(jnp.arange(1, 21) / 20)
    least = np.mean(a * STD**2 / (a * STD**2 + 1 - a))
    assert abs(plain["loss"].mean() - least) < 4 * plain["loss"].std() / np.sqrt(4000) < least / 4
    ratio = np.asarray(weighted["loss"] / weighted["squared_error"])
    assert len(np.unique(ratio.round(5))) > 3
    assert ratio.max() <= 1.0
    assert ratio.min() < 0.1


def test_guidance_scale_0_is_unconditional_1_conditional_2_beyond():
    def denoise(noisy, time, condition):
        said = jnp.where(condition.is_context[..., None], condition.context, 0.0)
        return noisy + per_medium(said.sum((1, 2)), noisy)

    noisy, time, condition = jnp.ones((2, 3)), jnp.ones(2), conditions(2)
    apply = jax.jit(lambda scale: guided(denoise, scale)(noisy, time, condition))
    conditional = denoise(noisy, time, condition)
    unconditional = denoise(noisy, time, without_context(condition))
    np.testing.assert_allclose(apply(1.0), conditional)
    np.testing.assert_allclose(apply(0.0), unconditional)
    np.testing.assert_allclose(apply(2.0), 2 * conditional - unconditional)
    assert apply._cache_size() == 1


def test_conditions_are_dropped_at_their_rate():
    keys = jax.random.split(jax.random.key(0), 1000)
    dropped = drop_conditions(conditions(1000), keys, 0.3)
    gone = ~np.asarray(dropped.is_context)
    np.testing.assert_array_equal(gone[:, 0], gone[:, 1])
    assert abs(gone[:, 0].mean() - 0.3) < 4 * np.sqrt(0.3 * 0.7 / 1000)
    assert np.all(drop_conditions(conditions(3), keys[:3], 0.0).is_context)


@pytest.mark.parametrize(("threshold", "wanted"), [("none", [-3, 0.5, 2]), ("clip", [-1, 0.5, 1])])
def test_predictions_are_kept_in_range(threshold, wanted):
    media = jnp.array([[-3, 0.5, 2]])
    np.testing.assert_allclose(limit(media, SamplerConfig(threshold=threshold))[0], wanted)


def test_dynamic_thresholds_use_the_configured_quantile():
    media = jnp.array([[-4.0, 0.5, 2.0]])
    settings = SamplerConfig(threshold="dynamic", threshold_quantile=0.5)
    np.testing.assert_allclose(limit(media, settings)[0], [-1, 0.25, 1])


def test_a_sampler_with_more_steps_than_times_is_an_error():
    with pytest.raises(ValueError, match="num_steps is 21, but the diffusion has 20 times"):
        sample_diffusion(
            perfect_denoiser(CONFIG),
            CONFIG,
            SamplerConfig(num_steps=21),
            conditions(1),
            (2,),
            jax.random.key(0),
        )
