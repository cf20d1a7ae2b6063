"""Collects every step's metrics on the device, and fetches, checks and writes them in batches."""

import contextlib
import itertools
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import logging

from megatransformer_jax.config.option import UserError
from megatransformer_jax.storage import (
    AnyPath,
    as_path,
    check_reachable,
    forget_listings,
    write_atomically,
)
from megatransformer_jax.training.progress import Progress
from megatransformer_jax.training.writers import MetricWriter

# ------------------------------------------------------------------------------
# Every step's metrics as JSON lines that are exact to the bit.


METRICS_FILE = "metrics.jsonl"
# In a bucket: a folder of parts of it.
METRIC_PARTS = "metrics"


class MetricsFile:
    """Appends one line per step to `path`.

    A float32 written as the shortest decimal of its float64 value reads back to the same bits, so
    two runs agree exactly when their files do. A value that is not finite is written as the
    string "nan", "inf" or "-inf", because JSON has no number for it. A line holds nothing that
    differs between equal runs, such as the time.

    Args:
      path: the file; made if absent.
      last_step: the step that the run continues from. Lines of later steps, written by an
        interrupted run after its last checkpoint, are dropped: those steps are run again. Lines
        that cannot be read are left out with a warning, and the file as it was is kept.

    Raises:
      UserError: if no line can be read.
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
        """Closes the file. `write` has told of a disk that is full."""
        with contextlib.suppress(OSError):
            self._file.close()

    def _truncate(self, last_step: int) -> None:
        if not self._path.exists():
            return
        rows, broken, is_cut = _read_lines(self._path.read_bytes())
        if broken and not rows:
            raise UserError(
                f"{self._path}, line {broken[0][0]}: {broken[0][1]!r} is not a step's metrics, and "
                "no other line is; move the file away to begin a new one."
            )
        if broken:
            self._keep_damaged(broken)
        if is_cut:
            logging.warning(
                "%s: its last line is cut off, as after a power failure, and is dropped.",
                self._path,
            )
        kept = [(line, row["step"]) for line, row in rows if row["step"] <= last_step]
        write_atomically(self._path, "".join(line for line, _ in kept))
        steps = {step for _, step in kept}
        missing = sorted(set(range(min(steps, default=last_step + 1), last_step + 1)) - steps)
        if missing:
            logging.warning(
                "%s has no metrics of %d of the steps up to %d, where the run goes on: %s.",
                self._path,
                len(missing),
                last_step,
                _first(missing),
            )

    def _keep_damaged(self, broken: Sequence[tuple[int, str]]) -> None:
        names = (f"{self._path.name}.damaged{number or ''}" for number in itertools.count())
        copy = next(path for path in map(self._path.with_name, names) if not path.exists())
        write_atomically(copy, self._path.read_bytes())
        logging.warning(
            "%s: what cannot be read is left out, line %s (%r); the file as it was is %s.",
            self._path,
            _first([number for number, _ in broken]),
            broken[0][1],
            copy.name,
        )


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, int | float]]:
    """The rows of a run's metrics, with non-finite values as floats again.

    Args:
      path: the file, or the folder of the run, which has it in parts if it is in a bucket.

    Raises:
      UserError: if there are none, or a line cannot be read, except for the last of several (see
        `_read_lines`).
    """
    folder = as_path("path", path)
    check_reachable("path", folder)
    file = folder / METRICS_FILE if folder.is_dir() else folder
    parts = [] if file.is_file() else metric_parts(folder)
    if not file.is_file() and not parts:
        raise UserError(f"{file} does not exist; name the folder of a run that has begun.")
    lines = _read_lines(b"".join(part.read_bytes() for part in parts or [file]))
    for number, text in lines.broken:
        raise UserError(
            f"{file}, line {number}: {text!r} is not a step's metrics; resume the run, which "
            "leaves it out, or remove that line, or move the file away to begin a new one."
        )
    return [
        {name: value if name == "step" else float(value) for name, value in row.items()}
        for _, row in lines.rows
    ]


def metric_parts(folder: AnyPath) -> list[AnyPath]:
    """The parts that a run's metrics have in a bucket, in the order of their steps.

    Objects cannot be appended to, so each part holds the lines of some steps, and is named by the
    first of them.
    """
    forget_listings(folder)
    try:
        return sorted((folder / METRIC_PARTS).glob("*.jsonl"), key=lambda path: path.name)
    except FileNotFoundError:  # There is no such bucket.
        return []


class _Lines(NamedTuple):
    """Lines with their rows, and numbers and beginnings of lines that cannot be read."""

    rows: list[tuple[str, dict[str, Any]]]
    broken: list[tuple[int, str]]
    is_cut: bool  # The last line, which is then in neither.


def _read_lines(content: bytes) -> _Lines:
    """The lines of a file of metrics.

    A process killed while it wrote leaves a last line without its end; a machine without power may
    leave one of other bytes. Any other line that cannot be read was damaged later.
    """
    lines = content.decode("utf-8", errors="replace").splitlines(keepends=True)
    found = _Lines([], [], is_cut=False)
    for number, line in enumerate(lines, start=1):
        row = _row(line)
        if row is not None:
            found.rows.append((line, row))
        elif number == len(lines) and (found.rows or not line.endswith("\n")):
            return found._replace(is_cut=True)
        else:
            found.broken.append((number, line.strip()[:60]))
    return found


def _first(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers[:8])) + (", ..." if numbers[8:] else "")


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


# ------------------------------------------------------------------------------
# The recorder.

# Counters, whose last value is what matters; everything else is averaged over a log interval.
_LAST_VALUE = ("skipped_steps", "skipped_in_row", "learning_rate")

# Steps that may wait on the device. Two keep it busy; more would only hold memory for batches.
MAX_STEPS_IN_FLIGHT = 2


class TooManyBadSteps(UserError):
    """The loss or the gradients were not finite for too many steps in a row."""


class MetricRecorder:
    """Where the loop puts each step's metrics.

    Args:
      metrics_file: gets every step, exact to the bit; None on processes that do not write.
      writer: gets means over the log interval.
      progress: shows them.
      learning_rate: from the number of updates before a step to its learning rate.
      max_bad_steps: non-finite steps in a row that end the run.
      on_report: called after each report. None: nothing is.
    """

    def __init__(
        self,
        *,
        metrics_file: MetricsFile | None,
        writer: MetricWriter,
        progress: Progress,
        learning_rate: Callable[[int], Any],
        max_bad_steps: int,
        on_report: Callable[[], None] | None = None,
    ):
        self._metrics_file = metrics_file
        self._writer = writer
        self._progress = progress
        self._learning_rate = learning_rate
        self._max_bad_steps = max_bad_steps
        self._on_report = on_report
        self._waiting: list[tuple[int, Mapping[str, jax.Array]]] = []
        self._window: list[dict[str, float]] = []
        self._last: Mapping[str, float] = {}

    @property
    def skipped_in_row(self) -> int:
        """Non-finite steps in a row up to the last step that was flushed."""
        return int(self._last.get("skipped_in_row", 0))

    @property
    def last(self) -> Mapping[str, float]:
        """Metrics of the last step that was flushed; none before the first."""
        return self._last

    @property
    def last_loss(self) -> float | None:
        """Loss of the last step that was flushed, or None before the first."""
        return self._last.get("loss")

    def add(self, step: int, metrics: Mapping[str, jax.Array]) -> None:
        """Takes the metrics of `step`, still being computed, and waits for an earlier step."""
        self._waiting.append((step, metrics))
        if len(self._waiting) > MAX_STEPS_IN_FLIGHT:
            jax.block_until_ready(self._waiting[-1 - MAX_STEPS_IN_FLIGHT][1])

    def flush(self) -> None:
        """Fetches the waiting metrics, writes them to the file and checks them.

        Raises:
          TooManyBadSteps: if `max_bad_steps` steps in a row were not finite.
        """
        values = jax.device_get([metrics for _, metrics in self._waiting])
        rows = []
        for (step, _), metrics in zip(self._waiting, values, strict=True):
            row = {name: float(value) for name, value in metrics.items()}
            row["learning_rate"] = float(self._learning_rate(_updates_before(step, row)))
            rows.append((step, row))
        self._waiting = []
        self._window += [row for _, row in rows]
        if self._metrics_file is not None:
            self._metrics_file.write(rows)
        for step, row in rows:
            self._last = row
            self._check(step, row)

    def report(self, step: int) -> None:
        """Writes and shows the means since the last report, up to `step`."""
        self.flush()
        if not self._window:
            return
        means = {
            name: self._window[-1][name]
            if name in _LAST_VALUE
            else float(np.mean([row[name] for row in self._window]))
            for name in self._window[-1]
        }
        self._window = []
        self._writer.write_scalars(step, {f"train/{name}": v for name, v in means.items()})
        self._progress.report(step, means)
        if self._on_report is not None:
            self._on_report()

    def _check(self, step: int, row: Mapping[str, float]) -> None:
        in_row = int(row["skipped_in_row"])
        if in_row >= self._max_bad_steps:
            raise TooManyBadSteps(
                f"the last {in_row} steps up to step {step} had a loss or gradients that are not "
                f"finite (loss {row['loss']}, gradient norm {row['grad_norm']}); their updates "
                "were skipped. Run the same command again with a lower optimizer.learning_rate or "
                "optimizer.clip_norm, longer optimizer.warmup_steps, or train.max_bad_steps above "
                f"{self._max_bad_steps}: it goes on from the newest checkpoint, whose parameters "
                "are from before these steps, or from the start if there is none."
            )


def _updates_before(step: int, row: Mapping[str, float]) -> int:
    """Updates that the optimiser had made before a step: skipped steps are not counted by it."""
    skipped_before = int(row["skipped_steps"]) - int(row["skipped_in_row"] > 0)
    return step - 1 - skipped_before
