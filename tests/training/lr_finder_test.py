"""From the losses of a range test to a learning rate."""

import math

import numpy as np
import pytest

from megatransformer_jax.config.option import UserError
from megatransformer_jax.training.lr_finder import (
    check_range,
    exponential_schedule,
    has_diverged,
    smooth,
    suggest,
)


def test_rates_rise_by_a_constant_factor():
    schedule = exponential_schedule(1e-5, 1.0, 6)
    np.testing.assert_allclose([schedule(i) for i in range(6)], np.logspace(-5, 0, 6), rtol=1e-5)


def test_smoothing_equals_the_weighted_mean():
    losses = [3.0, 1.0, 2.0, 5.0]
    weights = 0.8 ** np.arange(4)[::-1]
    expected = [np.average(losses[: n + 1], weights=weights[3 - n :]) for n in range(4)]
    np.testing.assert_allclose(smooth(losses, 0.8), expected)


def curve(rates):
    """Falls fastest at 1e-3, is lowest near 1e-2, and grows without limit above."""
    logs = np.log10(rates)
    return 6.0 - 2.0 / (1 + np.exp(-8 * (logs + 3))) + np.exp(6 * (logs + 1))


def test_the_suggestion_is_a_tenth_of_the_rate_of_the_lowest_loss():
    rates = np.logspace(-6, 0, 6000)
    losses = curve(rates).tolist()
    result = suggest(rates.tolist(), losses)
    lowest = rates[np.argmin(losses)]
    # Many steps per decade make the lag of smoothing small.
    assert result.minimum == pytest.approx(lowest, rel=0.05)
    assert result.steepest == pytest.approx(1e-3, rel=0.05)
    assert result.suggestion == pytest.approx(result.minimum / 10)
    assert not result.is_still_falling
    assert suggest(rates[:3000].tolist(), losses[:3000]).is_still_falling


def test_losses_count_up_to_the_first_that_is_not_finite():
    result = suggest([1e-3, 1e-2, 1e-1, 1.0, 10.0], [5.0, 4.0, 3.0, math.nan, 1.0])
    assert result.losses == (5.0, 4.0, 3.0)
    assert result.minimum == 1e-1


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        ([4.0], False),
        ([4.0, math.nan], True),
        ([4.0, math.inf], True),
        ([4.0, 3.0, 4.5], False),
        ([4.0, *[5.1] * 60], True),
        ([4.0, *[4.9] * 60], False),
    ],
)
def test_divergence(losses, expected):
    assert has_diverged(losses) == expected


@pytest.mark.parametrize(
    ("losses", "problem"),
    [
        ([1.0, math.nan, 1.0, 1.0], "finite for 1 steps only; begin with a lower --start"),
        ([1.0, 2.0, 3.0, 4.0], "never fell below its first value, 1; begin with a lower --start"),
    ],
)
def test_a_curve_that_says_nothing_is_an_error(losses, problem):
    with pytest.raises(UserError, match=problem):
        suggest([1e-3, 1e-2, 1e-1, 1.0], losses)


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ((0.0, 1.0, 100), "--start=0.0: .* above 0"),
        ((1e-3, 1e-3, 100), "--end=0.001: .* above --start=0.001"),
        ((1e-3, math.inf, 100), "--end=inf"),
        ((1e-3, 1.0, 9), "--steps=9 is too few"),
    ],
)
def test_a_range_that_cannot_be_used_is_an_error(arguments, problem):
    with pytest.raises(UserError, match=problem):
        check_range(*arguments)
