"""Noise schedules against their formulas, written again in NumPy."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from megatransformer_jax.ops.diffusion import (
    SCHEDULES,
    DiffusionSchedule,
    alpha_bar_table,
    signal_to_noise,
)

T = 50


def product_of(alphas):
    return np.array([np.prod(alphas[:i]) for i in range(len(alphas) + 1)])


def reference_table(kind):
    if kind == "linear":
        scale = 1000 / T
        return product_of(1 - np.linspace(scale * 1e-4, scale * 0.02, T))
    values = np.array([reference_curve(kind, i / T) for i in range(T + 1)])
    return product_of([max(b / a, 0.001) for a, b in itertools.pairwise(values)])


def reference_curve(kind, t):
    if kind == "linear":
        # exp of minus the integral of beta from 0.1 to 20, by the trapezoid, exact for a line.
        return np.exp(-t * (0.1 + (0.1 + 19.9 * t)) / 2)
    if kind == "cosine":
        f = lambda at: np.cos((at + 0.008) / 1.008 * np.pi / 2) ** 2  # noqa: E731
        return f(t) / f(0)
    sigmoid = lambda x: 1 / (1 + np.exp(-x))  # noqa: E731
    start, end = sigmoid(-3), sigmoid(3)
    return (end - sigmoid(6 * t - 3)) / (end - start)


@pytest.mark.parametrize("kind", SCHEDULES)
def test_equals_the_formula(kind):
    times = np.arange(T + 1) / T
    discrete = DiffusionSchedule(kind, T).alpha_bar(jnp.asarray(times, jnp.float32))
    np.testing.assert_allclose(discrete, reference_table(kind), rtol=2e-6, atol=1e-7)
    continuous = DiffusionSchedule(kind, None).alpha_bar(jnp.asarray(times, jnp.float32))
    wanted = np.maximum([reference_curve(kind, t) for t in times], 1e-5)
    np.testing.assert_allclose(continuous, wanted, rtol=1e-4, atol=1e-6)
    assert np.all(np.diff(discrete) < 0)
    assert discrete[0] == continuous[0] == 1.0
    np.testing.assert_allclose(
        signal_to_noise(discrete[1:]),
        reference_table(kind)[1:] / (1 - reference_table(kind)[1:]),
        rtol=1e-4,
    )


def test_ddpms_own_table():
    table = alpha_bar_table("linear", 1000)
    np.testing.assert_allclose(table[1:3], [0.9999, 0.9999 * (1 - 1e-4 - 0.0199 / 999)])
    np.testing.assert_allclose(np.log(table[-1]), -10.12, atol=0.01)


@pytest.mark.parametrize("num_times", [4, None])
def test_times_drawn_are_above_0_and_reach_1(num_times):
    schedule = DiffusionSchedule("cosine", num_times)
    draws = np.asarray(jax.vmap(schedule.draw_time)(jax.random.split(jax.random.key(0), 400)))
    if num_times:
        assert sorted(set(draws.tolist())) == [0.25, 0.5, 0.75, 1.0]
    else:
        assert 0 < draws.min() < 0.01 < 0.99 < draws.max() <= 1
        assert abs(draws.mean() - 0.5) < 4 * np.sqrt(1 / 12 / 400)


def test_a_sampler_steps_over_times_that_there_are():
    np.testing.assert_array_equal(
        DiffusionSchedule("cosine", 4).sampling_times(3), np.float32([1, 0.75, 0.25, 0])
    )
    np.testing.assert_allclose(
        DiffusionSchedule("cosine", None).sampling_times(3), [1, 2 / 3, 1 / 3, 0], rtol=1e-6
    )
    with pytest.raises(ValueError, match="num_steps is 5, but the diffusion has 4 times"):
        DiffusionSchedule("cosine", 4).sampling_times(5)


@pytest.mark.parametrize("num_times", [4, None])
def test_unknown_schedule_is_an_error(num_times):
    with pytest.raises(ValueError, match="unknown schedule 'square'"):
        DiffusionSchedule("square", num_times).alpha_bar(jnp.ones(1))
