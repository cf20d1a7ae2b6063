"""Depth draws: their distributions, the curriculum, and what they depend on."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatransformer_jax.config.recurrence import RecurrenceConfig
from megatransformer_jax.models.core import draw_num_steps, mean_at_step

NUM_DRAWS = 20_000
SAMPLINGS = ("lognormal_poisson", "fixed", "uniform", "poisson", "truncated_poisson", "geometric")


def many_draws(sampling, mean_steps=8, max_steps=512):
    config = RecurrenceConfig(
        sampling=sampling, mean_steps=mean_steps, max_steps=max_steps, draw_per="sequence"
    )
    return np.asarray(draw_num_steps(config, jax.random.key(0), 3, NUM_DRAWS, 1))


@pytest.mark.parametrize(
    ("sampling", "mean", "variance"),
    [
        # Poisson(rate) + 1 with a log-normal rate of mean 8: E = 9, Var = E[rate] + Var[rate].
        ("lognormal_poisson", 9.0, 8 + 64 * math.expm1(0.25)),
        ("fixed", 8.0, 0.0),
        ("uniform", 8.0, (15**2 - 1) / 12),
        ("poisson", 8.0, 7.0),
        ("truncated_poisson", 8.0, 8.0),
        ("geometric", 8.0, 8 * 7),
    ],
)
def test_mean_and_variance(sampling, mean, variance):
    draws = many_draws(sampling)
    # Five standard errors of the mean; the seed is fixed, so this cannot flicker.
    assert abs(draws.mean() - mean) <= 5 * math.sqrt(max(variance, 1e-9) / NUM_DRAWS) + 0.01
    assert draws.var() == pytest.approx(variance, rel=0.08)
    assert draws.min() >= 1


def test_uniform_takes_every_value_and_no_other():
    assert set(many_draws("uniform", mean_steps=4)) == set(range(1, 8))


def test_truncated_poisson_follows_its_probabilities():
    draws = many_draws("truncated_poisson", mean_steps=3, max_steps=5)
    weights = np.array([3.0**k / math.factorial(k) for k in range(1, 6)])
    observed = np.bincount(draws, minlength=6)[1:]
    expected = NUM_DRAWS * weights / weights.sum()
    # Chi-square with 4 degrees of freedom; 18.5 is passed by 99.9% of true samples.
    assert np.sum((observed - expected) ** 2 / expected) < 18.5


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize(
    ("draw_per", "shape"), [("batch", ()), ("sequence", (3,)), ("token", (3, 4))]
)
def test_shape_and_bounds(sampling, draw_per, shape):
    config = RecurrenceConfig(
        sampling=sampling, draw_per=draw_per, mean_steps=4, max_steps=7, backprop_depth=2
    )
    draws = draw_num_steps(config, jax.random.key(1), 0, 3, 4)
    assert draws.shape == shape
    assert draws.dtype == jnp.int32
    assert int(draws.min()) >= 1
    assert int(draws.max()) <= 7


def test_draws_follow_key_and_step_only():
    config = RecurrenceConfig(mean_steps=16)
    draw = jax.jit(lambda key, step: draw_num_steps(config, key, step, 2, 2))
    first = [int(draw(jax.random.key(5), step)) for step in range(20)]
    assert first == [int(draw(jax.random.key(5), step)) for step in range(20)]
    assert first != [int(draw(jax.random.key(6), step)) for step in range(20)]
    assert len(set(first)) > 5


@settings(deadline=None, max_examples=25)
@given(step=st.integers(0, 200))
def test_ramps(step):
    t = min(step / 100, 1.0)
    common = {"mean_steps": 32, "ramp_from": 4, "ramp_steps": 100}
    linear = RecurrenceConfig(ramp="linear", **common)
    slow = RecurrenceConfig(ramp="one_minus_sqrt", **common)
    assert float(mean_at_step(linear, step)) == pytest.approx(4 + 28 * t, abs=1e-3)
    assert float(mean_at_step(slow, step)) == pytest.approx(
        4 + 28 * (1 - math.sqrt(1 - t)), abs=1e-3
    )


def test_without_a_ramp_the_mean_is_constant():
    assert float(mean_at_step(RecurrenceConfig(mean_steps=7), 12345)) == 7.0


def test_a_ramp_shortens_early_draws():
    config = RecurrenceConfig(
        mean_steps=32, ramp="linear", ramp_steps=100, draw_per="sequence", sampling="poisson"
    )
    early, late = (draw_num_steps(config, jax.random.key(0), s, 500, 1) for s in (0, 100))
    assert float(jnp.mean(early)) == 1.0
    assert float(jnp.mean(late)) == pytest.approx(32, rel=0.05)
