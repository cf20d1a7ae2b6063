"""Saves by the clock, and how long saves take."""

import re
import threading

import pytest

from megatransformer_jax.checkpoints.save_times import SaveTimer, SaveTimes


def test_a_timer_is_due_after_its_minutes_and_counts_again_when_restarted() -> None:
    clock = [100.0]
    timer = SaveTimer(0.5, now=lambda: clock[0])
    seen = []
    for clock[0] in (129.9, 130.0, 500.0):
        seen.append(timer.is_due())
    timer.restart()
    for clock[0] in (529.9, 530.0):
        seen.append(timer.is_due())
    assert seen == [False, True, True, False, True]


def test_a_save_tells_how_long_the_steps_waited_and_when_it_was_whole(
    caplog: pytest.LogCaptureFixture,
) -> None:
    clock, is_whole = [0.0], threading.Event()
    times = SaveTimes(is_whole.wait, now=lambda: clock[0])
    with caplog.at_level("INFO", logger="absl"):
        with times.measure(7):
            clock[0] = 0.5
        assert times.take() == {"checkpoint/blocked_s": 0.5}
        assert times.take() == {} and not caplog.messages
        clock[0] = 3.0
        is_whole.set()
        times.finish()
    assert caplog.messages == ["saved step 7 in 3.0 s; the steps waited 0.5 s for it"]
    # What was not known at its own time comes with the next save.
    with times.measure(8):
        clock[0] = 4.0
    times.finish()
    assert times.take() == {"checkpoint/blocked_s": 1.0, "checkpoint/saved_s": 1.0}


def test_a_save_that_fails_is_not_called_saved(caplog: pytest.LogCaptureFixture) -> None:
    def fail() -> None:
        raise OSError("no room")

    times = SaveTimes(fail)
    with caplog.at_level("INFO", logger="absl"):
        with times.measure(7):
            pass
        times.finish()
    assert not re.search("saved", " ".join(caplog.messages))
    assert times.take().keys() == {"checkpoint/blocked_s"}

    def save() -> None:
        with times.measure(8):
            raise OSError("no folder")

    with pytest.raises(OSError, match="no folder"):
        save()
    times.finish()
    assert times.take() == {}
