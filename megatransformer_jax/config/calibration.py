"""Thresholds of exit criteria that were found for one model."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from megatransformer_jax.config.option import ConfigError
from megatransformer_jax.config.sampling import AUTO

# In the folder of a run.
CALIBRATION_FILE = "calibration.json"


@dataclasses.dataclass(frozen=True)
class Calibration:
    """Thresholds that keep a share of the full depth's accuracy.

    Attributes:
      depth: the full depth.
      accuracy: the share.
      thresholds: by criterion, those that were found.
      problem: why they are not for this model, in words that follow its calibration. None: they
        are.
    """

    depth: int
    accuracy: float
    thresholds: Mapping[str, float]
    problem: str | None = None

    @classmethod
    def useless(cls, problem: str) -> "Calibration":
        """One that says what is wrong with it when it is asked."""
        return cls(0, 0.0, {}, problem)

    @classmethod
    def of_values(cls, values: Mapping[str, Any], step: int, weights: str) -> "Calibration":
        """From what `CALIBRATION_FILE` holds, for a checkpoint.

        Args:
          values: of the file.
          step: of the checkpoint.
          weights: 'average' or 'raw'.
        """
        try:
            made_for = values["step"], values["weights"]
            rows = {row["criterion"]: row["threshold"] for row in values["rows"]}
            found = {name: float(value) for name, value in rows.items() if value is not None}
            calibration = cls(int(values["depth"]), float(values["accuracy"]), found)
        except (KeyError, TypeError, ValueError, AttributeError):
            return cls.useless("cannot be read")
        if made_for != (step, weights):
            problem = f"is of step {made_for[0]} ({made_for[1]} weights), and this is step {step}"
            return dataclasses.replace(calibration, problem=f"{problem} ({weights} weights)")
        return calibration

    def threshold(self, criterion: str, depth: int | None) -> float:
        """What was found.

        Args:
          criterion: its name.
          depth: most iterations of a token.

        Raises:
          ConfigError: if there is nothing for this model, criterion and depth.
        """
        problem, fix = self.problem, "calibrate it again"
        if problem is None and depth != self.depth:
            problem, fix = (
                f"is for depth={self.depth}, and this is {depth}",
                f"set depth={self.depth}, or calibrate it again with --depth={depth}",
            )
        if problem is None and criterion not in self.thresholds:
            known = ", ".join(self.thresholds) or "none"
            problem = f"has no threshold of {criterion} that keeps {self.accuracy:g} of accuracy"
            fix = f"choose one of those that it has ({known}), or calibrate for a lower accuracy"
        if problem is not None:
            raise ConfigError(
                "exit_threshold",
                f"{AUTO!r} needs a calibration, and that of this model {problem}; {fix}, or give a "
                "number.",
            )
        return self.thresholds[criterion]


def calibrated_threshold(
    calibration: Calibration | None, criterion: str, depth: int | None
) -> float:
    """`Calibration.threshold` of a model that may have none.

    Raises:
      ConfigError: also if it has none.
    """
    if calibration is None:
        raise ConfigError(
            "exit_threshold",
            f"{AUTO!r} needs a calibration, and this model has none; run megatransformer calibrate "
            "--model=RUN (in Python lm.calibrate()), or give a number.",
        )
    return calibration.threshold(criterion, depth)
