import io
import re

import pytest
from absl import logging
from rich.console import Console

from megatransformer_jax.training.progress import (
    BarProgress,
    LineProgress,
    StepClock,
    build_progress,
    format_duration,
)

SCALARS = {"loss": 3.21, "learning_rate": 1e-3, "num_steps": 8.0, "tokens": 100.0}


class Time:
    def __init__(self):
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def test_speed_and_time_left_come_from_the_clock():
    time = Time()
    clock = StepClock(100, time)
    clock.advance(1)
    time.now_s = 30.0  # The first step is compiled, which says nothing about the others.
    clock.advance(2)
    time.now_s = 34.5
    clock.tick(10, tokens_per_step=100.0)
    assert clock.tokens_per_s == pytest.approx(200)
    assert clock.eta_s(10) == pytest.approx(45)


def test_a_resumed_run_counts_from_where_it_starts():
    time = Time()
    clock = StepClock(100, time)
    clock.advance(81)
    clock.advance(82)
    time.now_s = 9.0
    clock.tick(90, tokens_per_step=1.0)
    assert clock.eta_s(90) == pytest.approx(10)


def test_time_in_hooks_is_not_counted():
    time = Time()
    clock = StepClock(100, time)
    clock.advance(1)
    clock.advance(2)
    time.now_s = 9.0
    clock.tick(10, tokens_per_step=100.0)
    time.now_s = 500.0
    clock.restart(10)
    time.now_s = 510.0
    clock.tick(20, tokens_per_step=100.0)
    assert clock.tokens_per_s == pytest.approx(100)


@pytest.mark.parametrize(
    ("duration_s", "text"), [(9.6, "10s"), (187.0, "3m07s"), (7500.0, "2h05m"), (3599.9, "1h00m")]
)
def test_durations(duration_s, text):
    assert format_duration(duration_s) == text


def test_lines_show_step_loss_speed_and_eta(caplog):
    time = Time()
    progress = LineProgress(200, StepClock(200, time))
    with caplog.at_level("INFO", logger="absl"), progress:
        progress.advance(1)
        progress.advance(2)
        time.now_s = 0.9
        progress.report(10, SCALARS)
    line = caplog.messages[-1]
    assert line == ("step 10/200  loss 3.2100  lr 1.00e-03  depth 8.0  1,000 tok/s  eta 19s")


def test_bar_shows_metrics_and_prints_log_messages_above_itself():
    output = io.StringIO()
    console = Console(file=output, force_terminal=True, width=120, legacy_windows=False)
    handler = logging.get_absl_handler().python_handler
    before = handler.stream
    with BarProgress(console, 20) as progress:
        progress.advance(5)
        progress.report(5, SCALARS)
        handler.stream.write("a message\n")
    assert handler.stream is before
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", output.getvalue())
    assert "5/20" in text and "loss 3.2100" in text and "a message" in text


def test_auto_chooses_by_the_terminal():
    plain = Console(file=io.StringIO(), force_terminal=False)
    terminal = Console(file=io.StringIO(), force_terminal=True)
    assert isinstance(build_progress("auto", plain, 10), LineProgress)
    assert isinstance(build_progress("auto", terminal, 10), BarProgress)
    with pytest.raises(ValueError, match="known: auto, bar, lines"):
        build_progress("dots", plain, 10)


def test_other_processes_show_nothing(caplog):
    progress = build_progress("lines", Console(), 10, is_primary=False)
    with caplog.at_level("INFO", logger="absl"), progress:
        progress.advance(1)
        progress.report(1, SCALARS)
    assert not caplog.messages
