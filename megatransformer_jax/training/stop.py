"""Ends a run between two steps when it is asked to stop (Ctrl-C, or a preempted machine)."""

import os
import signal
import threading
from types import FrameType
from typing import Any

import jax
from absl import logging
from jax.experimental import multihost_utils


class StopRequest:
    """Listens for SIGINT and SIGTERM while used as a context manager.

    The first signal asks the loop to finish its step, save and leave; a second Ctrl-C interrupts
    at once. With several processes all must leave after the same step, so JAX's preemption
    service, which listens for SIGTERM in each process, agrees on one.
    """

    def __init__(self) -> None:
        self._requested = False
        self._previous: dict[int, Any] = {}
        self._is_multi_process = jax.process_count() > 1

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is not threading.main_thread():
            return self  # Python delivers signals to the main thread only.
        # JAX's own SIGTERM handler must stay in place when there are several processes.
        wanted = (signal.SIGINT,) if self._is_multi_process else (signal.SIGINT, signal.SIGTERM)
        for number in wanted:
            self._previous[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *exception: Any) -> None:
        self._restore_handlers()

    def request(self) -> None:
        """Asks this run to stop, as a signal does."""
        if self._is_multi_process:
            os.kill(os.getpid(), signal.SIGTERM)
        self._requested = True

    def is_due(self, step: int) -> bool:
        """Whether to stop after `step`. Every process must ask at every step."""
        if self._is_multi_process:
            return multihost_utils.reached_preemption_sync_point(step)
        return self._requested

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._restore_handlers()
        logging.warning(
            "%s: finishing this step, then saving. Once more to stop at once without a save.",
            signal.Signals(number).name,
        )
        self.request()

    def _restore_handlers(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}
