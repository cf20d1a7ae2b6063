import math

import numpy as np
import pytest

from megatransformer_jax.config.optimizer import OptimizerConfig
from megatransformer_jax.training.optimizers import build_schedule

PEAK = 2e-3


def values(total_steps: int, **options) -> list[float]:
    schedule = build_schedule(OptimizerConfig(learning_rate=PEAK, **options), total_steps)
    return [float(schedule(step)) for step in range(total_steps)]


@pytest.mark.parametrize(
    "options",
    [
        {"schedule": "warmup_cosine"},
        {"schedule": "wsd", "decay_steps": 10},
        {"schedule": "constant"},
    ],
)
def test_warmup_is_linear_and_reaches_the_peak_at_its_last_step(options):
    rates = values(50, warmup_steps=8, **options)
    np.testing.assert_allclose(rates[:8], [PEAK * (s + 1) / 8 for s in range(8)], rtol=1e-6)


def test_cosine_follows_its_formula_and_ends_at_the_final_fraction():
    rates = values(101, schedule="warmup_cosine", warmup_steps=10, final_fraction=0.1)
    for step in range(10, 101):
        cosine = 0.5 * (1 + math.cos(math.pi * (step - 10) / 90))
        assert rates[step] == pytest.approx(PEAK * (0.1 + 0.9 * cosine), rel=1e-5)
    assert rates[-1] == pytest.approx(0.1 * PEAK, rel=1e-6)


def test_wsd_is_flat_then_decays_by_one_minus_sqrt():
    rates = values(100, schedule="wsd", warmup_steps=5, decay_steps=20, final_fraction=0.0)
    assert rates[5:80] == [pytest.approx(PEAK, rel=1e-6)] * 75
    for step in range(80, 100):
        assert rates[step] == pytest.approx(
            PEAK * (1 - math.sqrt((step - 79) / 20)), rel=1e-5, abs=1e-9
        )


def test_a_linear_decay_takes_its_share_of_the_run():
    rates = values(40, schedule="wsd", warmup_steps=0, decay_fraction=0.5, decay_shape="linear",
                   final_fraction=0.0)  # fmt: skip
    expected = [PEAK] * 20 + [PEAK * (1 - (step + 1) / 20) for step in range(20)]
    np.testing.assert_allclose(rates, expected, rtol=1e-5, atol=1e-9)


def test_constant_stays_at_the_peak():
    rates = values(30, schedule="constant", warmup_steps=0)
    assert rates == [pytest.approx(PEAK, rel=1e-6)] * 30


def test_warmup_longer_than_the_run_is_an_error():
    with pytest.raises(ValueError, match=r"warmup_steps=50 .* exceed the 10 steps"):
        build_schedule(OptimizerConfig(warmup_steps=50), 10)
