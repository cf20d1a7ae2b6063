"""Flow matching: paths, drawn times, and the order of its steps on a flow known exactly."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from megatransformer_jax.config.decoders import FlowConfig, FlowSamplerConfig
from megatransformer_jax.models.media.decoder import Condition
from megatransformer_jax.models.media.flow import flow_loss, sample_flow
from megatransformer_jax.ops.diffusion import draw_flow_time, flow_noisy, flow_velocity, per_medium

MEAN, STD = 0.5, 0.3
CONDITION = Condition(jnp.ones((2, 1, 1)), jnp.ones((2, 1), bool))


def perfect_velocity(noisy, time, condition):
    """E[noise - clean | x_t] where clean values are normal with MEAN and STD."""
    t = per_medium(time, noisy)
    variance = jnp.square((1 - t) * STD) + jnp.square(t)
    slope = (t - (1 - t) * STD**2) / variance
    return -MEAN + slope * (noisy - (1 - t) * MEAN)


def test_velocity_is_the_paths_derivative():
    clean, noise = jax.random.normal(jax.random.key(0), (2, 3, 4))
    time = jnp.array([0.0, 0.3, 1.0])
    wanted = (1 - np.asarray(time))[:, None] * clean + np.asarray(time)[:, None] * noise
    np.testing.assert_allclose(flow_noisy(clean, noise, time), wanted, atol=1e-6)
    _, derivative = jax.jvp(lambda t: flow_noisy(clean, noise, t), (time,), (jnp.ones(3),))
    np.testing.assert_allclose(flow_velocity(clean, noise), derivative, atol=1e-6)


def test_times_are_drawn_as_told():
    keys = jax.random.split(jax.random.key(0), 2000)

    def draws(*settings):
        return np.asarray(jax.vmap(lambda key: draw_flow_time(*settings, key))(keys))

    uniform, logit = draws("uniform", 0.0, 1.0), draws("logit_normal", 0.5, 2.0)
    assert abs(uniform.mean() - 0.5) < 4 * np.sqrt(1 / 12 / 2000)
    normal = np.log(logit / (1 - logit))
    assert abs(normal.mean() - 0.5) < 4 * 2 / np.sqrt(2000)
    assert abs(normal.std() - 2) < 4 * 2 / np.sqrt(4000)
    with pytest.raises(ValueError, match="unknown draw of times 'x'"):
        draw_flow_time("x", 0.0, 1.0, keys[0])


def test_samplers_follow_the_exact_flow():
    """The flow maps noise z to MEAN + STD z; Heun's error falls faster than Euler's."""

    @jax.jit
    def draw_all(key):
        return {
            (sampler, steps): sample_flow(
                perfect_velocity,
                FlowSamplerConfig(sampler=sampler, num_steps=steps),
                CONDITION,
                (500,),
                key,
            )
            for sampler in ("euler", "heun")
            for steps in (8, 16, 200)
        }

    drawn = draw_all(jax.random.key(1))
    exact = drawn["heun", 200]
    assert abs(exact.mean() - MEAN) < 4 * STD / np.sqrt(1000)
    assert abs(exact.std() / STD - 1) < 4 / np.sqrt(2000)
    error = {name: float(np.max(np.abs(values - exact))) for name, values in drawn.items()}
    assert 1.5 < error["euler", 8] / error["euler", 16] < 3
    assert error["heun", 8] / error["heun", 16] > 3
    assert error["heun", 16] < error["euler", 16] / 4


def test_the_loss_is_least_for_the_perfect_velocity():
    media = MEAN + STD * jax.random.normal(jax.random.key(2), (2000, 3))
    condition = Condition(jnp.ones((2000, 1, 1)), jnp.ones((2000, 1), bool))

    def mean_loss(config, network):
        loss = jax.jit(lambda key: flow_loss(network, config, media, condition, key)["loss"])(
            jax.random.key(3)
        )
        return float(loss.mean()), float(loss.std() / np.sqrt(2000))

    t = (np.arange(1000) + 0.5) / 1000
    least = np.mean(STD**2 / ((1 - t) ** 2 * STD**2 + t**2))
    uniform, error = mean_loss(FlowConfig(time_draw="uniform"), perfect_velocity)
    assert abs(uniform - least) < 4 * error < least / 3
    worse, _ = mean_loss(
        FlowConfig(time_draw="uniform"), lambda *args: perfect_velocity(*args) + 0.5
    )
    assert abs(worse - uniform - 0.25) < 0.05
    # Near the noise the clean medium is hard to tell, near the medium the noise.
    late, _ = mean_loss(FlowConfig(time_mean=5.0, time_std=0.1), perfect_velocity)
    np.testing.assert_allclose(late, STD**2, rtol=0.2)
