"""Shows a run's progress: a live bar on a terminal, otherwise one line per log point."""

import html
import time
import typing
from collections.abc import Callable, Mapping
from typing import Any

from absl import logging
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as RichProgress

# Redrawing a notebook's output more often costs more than it shows.
_REDRAW_S = 0.25


@typing.runtime_checkable
class Progress(typing.Protocol):
    """What the loop tells about its progress. Used as a context manager."""

    def __enter__(self) -> "Progress": ...

    def __exit__(self, *exception: Any) -> None: ...

    def advance(self, step: int) -> None:
        """The step that makes `step` steps of the run is about to start."""

    def report(self, step: int, scalars: Mapping[str, float]) -> None:
        """The metrics of the last log interval, which ended with `step`."""

    def resume(self, step: int) -> None:
        """The hooks after `step` are done; their time is not that of steps."""


def build_progress(
    kind: str, console: Console, total_steps: int, *, is_primary: bool = True
) -> Progress:
    """The progress display for `logging.progress` ('auto', 'bar' or 'lines').

    Only the primary process shows anything.

    Raises:
      ValueError: if the kind is unknown.
    """
    if kind not in ("auto", "bar", "lines"):
        raise ValueError(f"unknown progress {kind!r}; known: auto, bar, lines")
    if not is_primary:
        return _Silent()
    if kind == "auto":
        kind = "bar" if console.is_terminal or console.is_jupyter else "lines"
    if kind == "lines":
        return LineProgress(total_steps)
    if console.is_jupyter:
        return NotebookProgress(total_steps)
    return BarProgress(console, total_steps)


class StepClock:
    """Speed of a run: tokens per second of the last interval and the time left.

    Args:
      total_steps: steps of the whole run.
      now: the clock, in seconds.
    """

    def __init__(self, total_steps: int, now: Callable[[], float] = time.monotonic):
        self._total_steps = total_steps
        self._now = now
        self._starts = 0
        self._last: tuple[int, float] | None = None
        self._step_s: float | None = None
        self.tokens_per_s: float | None = None

    def advance(self, step: int) -> None:
        """Step number `step` is about to start."""
        if self._starts == 1:
            # Not from the very first step, which waits for the compiler.
            self._last = (step - 1, self._now())
        self._starts += 1

    def restart(self, step: int) -> None:
        """Begins a new interval after `step`: what was done since the last tick does not count."""
        if self._last is not None:
            self._last = (step, self._now())

    def tick(self, step: int, tokens_per_step: float) -> None:
        """Ends an interval with `step` and begins the next."""
        now = self._now()
        if self._last is not None and step > self._last[0] and now > self._last[1]:
            step_s = (now - self._last[1]) / (step - self._last[0])
            self.tokens_per_s = tokens_per_step / step_s
            self._step_s = step_s if self._step_s is None else 0.5 * (self._step_s + step_s)
            self._last = (step, now)

    def eta_s(self, step: int) -> float | None:
        """Seconds until the last step, or None before the first interval."""
        return None if self._step_s is None else (self._total_steps - step) * self._step_s


def describe(scalars: Mapping[str, float], clock: StepClock, step: int) -> str:
    """Loss, learning rate, depth, speed and time left in one short line."""
    parts = []
    for name, label, spec in (
        ("loss", "loss", ".4f"),
        ("learning_rate", "lr", ".2e"),
        ("num_steps", "depth", ".1f"),
    ):
        if name in scalars:
            parts.append(f"{label} {scalars[name]:{spec}}")
    if clock.tokens_per_s:  # Runs without text count no tokens.
        parts.append(f"{clock.tokens_per_s:,.0f} tok/s")
    eta_s = clock.eta_s(step)
    if eta_s is not None:
        parts.append(f"eta {format_duration(eta_s)}")
    if scalars.get("skipped_steps", 0):
        parts.append(f"skipped {scalars['skipped_steps']:.0f}")
    return "  ".join(parts)


def format_duration(duration_s: float) -> str:
    """12s, 3m07s, 2h05m."""
    minutes, seconds = divmod(round(duration_s), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{seconds:02d}s" if minutes else f"{seconds}s"


class LineProgress:
    """One log line per log point."""

    def __init__(self, total_steps: int, clock: StepClock | None = None):
        self._total_steps = total_steps
        self._clock = clock or StepClock(total_steps)
        self._is_started = False

    def __enter__(self) -> "LineProgress":
        return self

    def __exit__(self, *exception: Any) -> None:
        pass

    def advance(self, step: int) -> None:
        """Starts the clock."""
        if not self._is_started:
            logging.info("compiling the train step ...")
            self._is_started = True
        self._clock.advance(step)

    def report(self, step: int, scalars: Mapping[str, float]) -> None:
        """Logs one line."""
        self._clock.tick(step, scalars.get("tokens", 0.0))
        logging.info(
            "step %d/%d  %s", step, self._total_steps, describe(scalars, self._clock, step)
        )

    def resume(self, step: int) -> None:
        """Restarts the clock."""
        self._clock.restart(step)


class BarProgress:
    """A live bar with the latest metrics; log messages appear above it."""

    def __init__(self, console: Console, total_steps: int, clock: StepClock | None = None):
        self._clock = clock or StepClock(total_steps)
        self._rich = RichProgress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=20),
            TextColumn("{task.fields[metrics]}"),
            console=console,
            refresh_per_second=4,
        )
        self._task = self._rich.add_task("train", total=total_steps, metrics="compiling ...")

    def __enter__(self) -> "BarProgress":
        self._rich.start()
        # absl kept the stream of before; the one that rich put in its place prints above the bar.
        self._log_handler = logging.get_absl_handler().python_handler
        self._log_stream = self._log_handler.stream
        self._log_handler.stream = _RichStream(self._rich.console)
        return self

    def __exit__(self, *exception: Any) -> None:
        self._log_handler.stream = self._log_stream
        self._rich.stop()

    def advance(self, step: int) -> None:
        """Moves the bar."""
        self._clock.advance(step)
        self._rich.update(self._task, completed=step)

    def report(self, step: int, scalars: Mapping[str, float]) -> None:
        """Shows the latest metrics next to the bar."""
        self._clock.tick(step, scalars.get("tokens", 0.0))
        self._rich.update(self._task, metrics=describe(scalars, self._clock, step))

    def resume(self, step: int) -> None:
        """Restarts the clock."""
        self._clock.restart(step)


class NotebookProgress:
    """A bar below the cell of a notebook, without widgets.

    Args:
      total_steps: steps of the whole run.
      clock: measures their speed.
      show: shows HTML the first time, then replaces it. None: IPython's display.
    """

    def __init__(
        self,
        total_steps: int,
        clock: StepClock | None = None,
        show: Callable[[str, bool], None] | None = None,
    ):
        self._total_steps = total_steps
        self._clock = clock or StepClock(total_steps)
        self._show = show or _NotebookDisplay()
        self._step = 0
        self._metrics = "compiling ..."
        self._shown_at: float | None = None

    def __enter__(self) -> "NotebookProgress":
        self._draw()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._draw()

    def advance(self, step: int) -> None:
        """Moves the bar, a few times per second."""
        self._clock.advance(step)
        self._step = step
        if self._shown_at is None or time.monotonic() - self._shown_at > _REDRAW_S:
            self._draw()

    def report(self, step: int, scalars: Mapping[str, float]) -> None:
        """Shows the latest metrics next to the bar."""
        self._clock.tick(step, scalars.get("tokens", 0.0))
        self._metrics = describe(scalars, self._clock, step)
        self._draw()

    def resume(self, step: int) -> None:
        """Restarts the clock."""
        self._clock.restart(step)

    def _draw(self) -> None:
        text = f"step {self._step}/{self._total_steps} &nbsp; {html.escape(self._metrics)}"
        bar = f"<progress value='{self._step}' max='{self._total_steps}'></progress>"
        self._show(f"<div>{bar} {text}</div>", self._shown_at is not None)
        self._shown_at = time.monotonic()


class _NotebookDisplay:
    """One output of a cell that is replaced."""

    def __init__(self) -> None:
        self._handle: Any = None

    def __call__(self, content: str, is_update: bool) -> None:
        from IPython.display import HTML, display  # noqa: PLC0415 (is there where notebooks run)

        if is_update:
            self._handle.update(HTML(content))
        else:
            self._handle = display(HTML(content), display_id=True)


class _RichStream:
    """A text stream whose lines rich prints above the live bar."""

    def __init__(self, console: Console):
        self._console = console

    def write(self, text: str) -> int:
        line = text.rstrip("\n")
        if line:
            self._console.print(line, markup=False, highlight=False, soft_wrap=True)
        return len(text)

    def flush(self) -> None:
        pass


class _Silent:
    """Shows nothing."""

    def __enter__(self) -> "_Silent":
        return self

    def __exit__(self, *exception: Any) -> None:
        pass

    def advance(self, step: int) -> None:
        pass

    def report(self, step: int, scalars: Mapping[str, float]) -> None:
        pass

    def resume(self, step: int) -> None:
        pass
