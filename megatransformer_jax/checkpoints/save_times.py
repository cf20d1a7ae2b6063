"""When the next save is due by the clock, and how long saves take."""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator

import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils

_S_PER_MINUTE = 60.0


class SaveTimer:
    """Says when minutes have passed since the last save, or since the timer was made.

    Clocks differ, and a save needs all processes after the same step. So process 0 decides and
    tells the others.

    Args:
      minutes: between two saves.
      now: the clock, in seconds.
    """

    def __init__(self, minutes: float, now: Callable[[], float] = time.monotonic):
        self._interval_s = minutes * _S_PER_MINUTE
        self._now = now
        self._since = now()

    def is_due(self) -> bool:
        """Whether to save now. Every process must ask after the same steps, and is told the same.

        With several processes this waits for the devices.
        """
        is_over = self._now() - self._since >= self._interval_s
        if jax.process_count() > 1:
            is_over = bool(multihost_utils.broadcast_one_to_all(np.array(is_over)))
        return is_over

    def restart(self) -> None:
        """Begins to count again: a save, for whatever reason, has been made."""
        self._since = self._now()


class SaveTimes:
    """Measures saves that go on in the background.

    Args:
      wait: returns once the save that was begun last has ended, and raises if it has failed.
      now: the clock, in seconds.
    """

    def __init__(self, wait: Callable[[], None], now: Callable[[], float] = time.monotonic):
        self._wait = wait
        self._now = now
        self._thread: threading.Thread | None = None
        self._last_s: dict[str, float] = {}

    @contextlib.contextmanager
    def measure(self, step: int) -> Iterator[None]:
        """The block begins to save the checkpoint of `step`; the log says when it is whole."""
        self.finish()
        start = self._now()
        yield
        blocked_s = self._now() - start
        self._last_s["checkpoint/blocked_s"] = blocked_s
        self._thread = threading.Thread(target=self._watch, args=(step, start, blocked_s))
        self._thread.start()

    def take(self) -> dict[str, float]:
        """What is new since the last call, in seconds, under the names of metrics.

        `checkpoint/blocked_s` is how long the loop waited for the last save to begin,
        `checkpoint/saved_s` how long a save took until it was whole. That of the last save is
        often not known yet.
        """
        taken, self._last_s = self._last_s, {}
        return taken

    def finish(self) -> None:
        """Waits until the last save has been told of."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _watch(self, step: int, start: float, blocked_s: float) -> None:
        try:
            self._wait()
        except Exception:  # The manager raises it where the run waits for the save.
            logging.debug("the save of step %d has failed", step)
            return
        saved_s = self._now() - start
        self._last_s["checkpoint/saved_s"] = saved_s
        logging.info(
            "saved step %d in %.1f s; the steps waited %.1f s for it", step, saved_s, blocked_s
        )
