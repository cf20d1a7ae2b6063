"""What a calibration says to exit_threshold=auto, and why it may say nothing."""

import pytest

from megatransformer_jax.config.calibration import Calibration, calibrated_threshold
from megatransformer_jax.config.generation import GenerationConfig, for_model
from megatransformer_jax.config.option import ConfigError

VALUES = {
    "step": 40,
    "weights": "average",
    "depth": 6,
    "accuracy": 0.98,
    "rows": [
        {"criterion": "margin", "threshold": 0.25},
        {"criterion": "kl", "threshold": None},
    ],
}
FOUND = Calibration.of_values(VALUES, 40, "average")


def settled(**options):
    config = GenerationConfig.of(**options)
    return for_model(config, 6, has_exit_gate=False, calibration=FOUND).depth


def test_auto_is_the_threshold_of_criterion_and_depth():
    assert settled(exit_criterion="margin", exit_threshold="auto").threshold == 0.25
    deep = settled(exit_criterion="margin", exit_threshold="auto", depth=6)
    assert (deep.threshold, deep.depth) == (0.25, 6)
    assert settled(exit_criterion="margin", exit_threshold=0.1).threshold == 0.1
    assert settled(exit_criterion="margin").threshold is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"exit_criterion": "margin", "depth": 8}, r"is for depth=6, and this is 8; set depth=6"),
        ({"exit_criterion": "kl"}, r"no threshold of kl that keeps 0\.98 .* has \(margin\)"),
    ],
)
def test_another_depth_or_criterion_is_an_error(options, message):
    with pytest.raises(ConfigError, match=message) as caught:
        settled(exit_threshold="auto", **options)
    assert caught.value.path == "depth.exit_threshold"


def test_without_a_calibration_or_with_that_of_another_checkpoint_is_an_error():
    with pytest.raises(ConfigError, match=r"this model has none; run megatransformer calibrate"):
        calibrated_threshold(None, "margin", 6)
    for given, message in (
        ((VALUES, 80, "average"), r"is of step 40 \(average weights\), and this is step 80"),
        ((VALUES, 40, "raw"), r"this is step 40 \(raw weights\); calibrate it again"),
        ((None, 40, "raw"), "cannot be read; calibrate it again"),
        (({"rows": []}, 40, "raw"), "cannot be read"),
    ):
        with pytest.raises(ConfigError, match=message):
            calibrated_threshold(Calibration.of_values(*given), "margin", 6)


def test_auto_needs_a_criterion():
    with pytest.raises(ConfigError, match=r"exit_threshold: 'auto' would be ignored"):
        GenerationConfig.of(exit_threshold="auto")
