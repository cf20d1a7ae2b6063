"""Every step's metrics as JSON lines that are exact to the bit."""

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import logging

from megatransformer_jax.config.option import UserError


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

    Raises:
      UserError: if a line other than the last cannot be read.
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
        rows, is_cut = _read_lines(self._path)
        if is_cut:
            logging.warning(
                "%s: its last line is cut off, as after a power failure, and is dropped.",
                self._path,
            )
        kept = [line for line, row in rows if row["step"] <= last_step]
        temporary = self._path.with_suffix(".tmp")
        temporary.write_text("".join(kept), encoding="utf-8")
        os.replace(temporary, self._path)


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, int | float]]:
    """The rows of a metrics file, with non-finite values as floats again.

    Raises:
      UserError: if a line other than the last cannot be read.
    """
    return [
        {name: value if name == "step" else float(value) for name, value in row.items()}
        for _, row in _read_lines(Path(path))[0]
    ]


def _read_lines(path: Path) -> tuple[list[tuple[str, dict[str, Any]]], bool]:
    """Lines with their rows, and whether the last line was cut and is left out.

    A process killed while it wrote leaves a last line without its end; a machine without power may
    leave one of other bytes.
    """
    lines = path.read_bytes().decode("utf-8", errors="replace").splitlines(keepends=True)
    rows = []
    for number, line in enumerate(lines, start=1):
        row = _row(line)
        if row is not None:
            rows.append((line, row))
        elif number < len(lines):
            raise UserError(
                f"{path}, line {number}: {line.strip()[:60]!r} is not a step's metrics; remove "
                "that line, or move the file away to begin a new one."
            )
    return rows, len(rows) < len(lines)


def _row(line: str) -> dict[str, Any] | None:
    """The values of a complete line, or None."""
    if not line.endswith("\n"):
        return None
    try:
        row = json.loads(line)
    except json.JSONDecodeError:
        return None
    return row if isinstance(row, dict) and isinstance(row.get("step"), int) else None


def _exact(value: float) -> float | str:
    value = float(value)
    return value if math.isfinite(value) else str(value)
