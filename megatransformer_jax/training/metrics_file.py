"""Every step's metrics as JSON lines that are exact to the bit."""

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path


class MetricsFile:
    """Appends one line per step to `path`.

    A float32 written as the shortest decimal of its float64 value reads back to the same bits, so
    two runs agree exactly when their files do. A value that is not finite is written as the
    string "nan", "inf" or "-inf", because JSON has no number for it. A line holds nothing that
    differs between equal runs, such as the time.

    Args:
      path: the file; made if absent.
      last_step: the step that the run continues from. Lines of later steps, written by an
        interrupted run after its last checkpoint, are dropped: those steps are run again.
    """

    def __init__(self, path: str | os.PathLike[str], last_step: int):
        self._path = Path(path)
        self._truncate(last_step)
        self._file = open(self._path, "a", encoding="utf-8")  # noqa: SIM115 (closed in close())

    def write(self, rows: Sequence[tuple[int, Mapping[str, float]]]) -> None:
        """Writes (step, values) pairs and hands them to the operating system."""
        for step, values in rows:
            numbers = {name: _exact(value) for name, value in values.items()}
            self._file.write(json.dumps({"step": step, **numbers}, allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def _truncate(self, last_step: int) -> None:
        if not self._path.exists():
            return
        kept = [row for row in _complete_lines(self._path) if json.loads(row)["step"] <= last_step]
        temporary = self._path.with_suffix(".tmp")
        temporary.write_text("".join(kept), encoding="utf-8")
        os.replace(temporary, self._path)


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, int | float]]:
    """The rows of a metrics file, with non-finite values as floats again."""
    return [
        {
            name: value if name == "step" else float(value)
            for name, value in json.loads(line).items()
        }
        for line in _complete_lines(Path(path))
    ]


def _complete_lines(path: Path) -> list[str]:
    # A process killed while it wrote leaves a last line without its end.
    with open(path, encoding="utf-8") as file:
        return [line for line in file if line.endswith("\n")]


def _exact(value: float) -> float | str:
    value = float(value)
    return value if math.isfinite(value) else str(value)
