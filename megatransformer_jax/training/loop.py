"""The training loop: step, record, hooks. It builds nothing and knows no hook.

Validation, samples, checkpoints and whatever else a run does besides stepping arrive in the loop
as hooks, so that the loop knows none of them and training never imports evaluation.
"""

import contextlib
import dataclasses
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import FrameType
from typing import Any, Protocol, runtime_checkable

import jax
from absl import logging
from jax.experimental import multihost_utils

from megatransformer_jax.checkpoints.save_times import SaveTimer
from megatransformer_jax.training.progress import Progress
from megatransformer_jax.training.recorder import MetricRecorder
from megatransformer_jax.training.state import TrainState
from megatransformer_jax.training.writers import MetricWriter
from megatransformer_jax.types import Batch

# ------------------------------------------------------------------------------
# Hooks: the protocol, and when one is due.


@runtime_checkable
class Hook(Protocol):
    """Called after every `every_steps` steps.

    Attributes:
      every_steps: interval; 0 for never.
      at_end: also called after the last step of the run.
      at_stop: also called when the run stops early because it was asked to.
      skips_bad_steps: not called after a step whose update was skipped because it was not finite,
        unless the run ends or stops there.
    """

    every_steps: int
    at_end: bool
    at_stop: bool
    skips_bad_steps: bool

    def __call__(
        self, step: int, state: TrainState, scalars: Mapping[str, float]
    ) -> Mapping[str, float]:
        """Acts on the state.

        Args:
          step: steps done so far.
          state: the train state after them. It is donated to the next step: do not keep it.
          scalars: what the hooks before this one returned after the same step.

        Returns:
          Numbers to write under their names; empty if there are none.
        """


@runtime_checkable
class TimedHook(Hook, Protocol):
    """A hook that is also called when it asks for it."""

    def is_wanted(self) -> bool:
        """Whether to be called after the present step; asked at each report, by all processes."""


def is_due(hook: Hook, step: int, *, is_last: bool, is_stopping: bool) -> bool:
    """Whether `hook` is to be called after `step`."""
    regular = hook.every_steps > 0 and step % hook.every_steps == 0
    return regular or (is_last and hook.at_end) or (is_stopping and hook.at_stop)


class CheckpointHook:
    """Saves the state, with the validation scalars of the same step if there are any.

    While steps are skipped the parameters stay those of the last good step, so nothing is saved:
    the newest checkpoint remains one that a repaired run can go on from. At the end and at a stop
    it is saved all the same, for the position in the data.

    Args:
      every_steps: steps between saves; the last step and an early stop are saved too.
      save: called with (step, state, validation scalars by name); returns numbers to write.
      timer: says when to save besides. None: never.
    """

    at_end = True
    at_stop = True
    skips_bad_steps = True

    def __init__(
        self,
        every_steps: int,
        save: Callable[[int, TrainState, Mapping[str, float]], Mapping[str, float]],
        timer: SaveTimer | None = None,
    ):
        self.every_steps = every_steps
        self._save = save
        self._timer = timer

    def is_wanted(self) -> bool:
        """Whether the timer says so."""
        return self._timer is not None and self._timer.is_due()

    def __call__(
        self, step: int, state: TrainState, scalars: Mapping[str, float]
    ) -> Mapping[str, float]:
        """Starts the save; it ends in the background."""
        scores = {name: v for name, v in scalars.items() if name.startswith("validation/")}
        if self._timer is not None:
            self._timer.restart()
        return self._save(step, state, scores)


class CheckHook:
    """Ends the run when something in the background has failed, such as a save.

    Args:
      every_steps: steps between two looks.
      check: raises what has failed; it waits for nothing.
    """

    at_end = False
    at_stop = False
    skips_bad_steps = False

    def __init__(self, every_steps: int, check: Callable[[], None]):
        self.every_steps = every_steps
        self._check = check

    def __call__(
        self, step: int, state: TrainState, scalars: Mapping[str, float]
    ) -> Mapping[str, float]:
        """Looks."""
        self._check()
        return {}


class SampleHook:
    """Shows samples of the model and writes them as text.

    Args:
      every_steps: steps between samples; 0: never.
      make_samples: from (state, step) to texts by name.
      write_texts: called with (step, texts by name).
    """

    at_stop = False
    skips_bad_steps = False

    def __init__(
        self,
        every_steps: int,
        make_samples: Callable[[TrainState, int], Mapping[str, str]],
        write_texts: Callable[[int, Mapping[str, str]], None],
    ):
        self.every_steps = every_steps
        self.at_end = every_steps > 0
        self._make_samples = make_samples
        self._write_texts = write_texts

    def __call__(
        self, step: int, state: TrainState, scalars: Mapping[str, float]
    ) -> Mapping[str, float]:
        """Generates, logs and writes the samples."""
        texts = self._make_samples(state, step)
        for name, text in texts.items():
            logging.info("sample %s after step %d: %s", name, step, text)
        self._write_texts(step, texts)
        return {}


# ------------------------------------------------------------------------------
# Ends a run between two steps when it is asked to stop (Ctrl-C, or a preempted machine).


class StopRequest:
    """Listens for SIGINT and SIGTERM while used as a context manager.

    The first signal asks the loop to finish its step, save and leave; a second Ctrl-C interrupts
    at once. With several processes all must leave after the same step, so JAX's preemption
    service, which listens for SIGTERM in each process, agrees on one.

    Before the first step there is nothing to save, and to compile it may take minutes. SIGTERM then
    ends a run of one process at once, with exit code 143 as without a handler.

    Args:
      has_steps: whether there are steps to save already.
      before_exit: called before the process ends at once.
    """

    def __init__(
        self, *, has_steps: bool = False, before_exit: Callable[[], None] | None = None
    ) -> None:
        self._requested = False
        self._has_steps = has_steps
        self._before_exit = before_exit
        self._previous: dict[int, Any] = {}
        self._notice: threading.Thread | None = None
        self._is_multi_process = jax.process_count() > 1
        self._pipe: _SignalPipe | None = None

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is not threading.main_thread():
            return self  # Python delivers signals to the main thread only.
        # JAX's own SIGTERM handler must stay in place when there are several processes.
        wanted = (signal.SIGINT,) if self._is_multi_process else (signal.SIGINT, signal.SIGTERM)
        for number in wanted:
            self._previous[number] = signal.signal(number, self._on_signal)
        if not (self._has_steps or self._is_multi_process):
            self._pipe = _SignalPipe(self._exit_at_once)
        return self

    def __exit__(self, *exception: Any) -> None:
        self._close_pipe()
        self._restore_handlers()
        if self._notice is not None:
            self._notice.join()

    def request(self) -> None:
        """Asks this run to stop, as a signal does."""
        if self._is_multi_process:
            os.kill(os.getpid(), signal.SIGTERM)
        self._requested = True

    def is_due(self, step: int) -> bool:
        """Whether to stop after `step`. Every process must ask at every step."""
        self._has_steps = True
        self._close_pipe()
        if not self._is_multi_process:
            return self._requested
        is_agreed = multihost_utils.reached_preemption_sync_point(step)
        if is_agreed:
            logging.warning("a process of this run was asked to stop: saving step %d.", step)
        return is_agreed

    def _exit_at_once(self, number: int) -> None:
        """In a thread of its own: the main thread may be in the compiler."""
        if self._has_steps or number != signal.SIGTERM:
            return
        logging.warning("SIGTERM: no step has been made, so there is nothing to save; stopped.")
        if self._before_exit is not None:
            self._before_exit()
        os._exit(128 + number)

    def _close_pipe(self) -> None:
        pipe, self._pipe = self._pipe, None
        if pipe is not None:
            pipe.close()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._restore_handlers()
        self.request()
        if self._pipe is not None and number == signal.SIGTERM:
            return  # The process is about to end.
        # The signal may have come in the middle of a line of the log, which the main thread cannot
        # write into again: Python raises an error that would undo all of this.
        self._notice = threading.Thread(
            target=logging.warning,
            args=(
                "%s: finishing this step, then saving. Once more to stop at once without a save.",
                signal.Signals(number).name,
            ),
        )
        self._notice.start()

    def _restore_handlers(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}


class _SignalPipe:
    """Calls a function in another thread as soon as a signal comes.

    Python's own handlers wait until the main thread is back from native code, such as the compiler.

    Args:
      call: gets the number of each signal.
    """

    def __init__(self, call: Callable[[int], None]):
        self._call = call
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        self._previous = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Ends the thread; signals go where they went before."""
        signal.set_wakeup_fd(self._previous)
        self._writer.close()
        self._thread.join()
        self._reader.close()

    def _listen(self) -> None:
        while number := self._reader.recv(1):
            self._call(number[0])


# ------------------------------------------------------------------------------
# The loop.

StepFunction = Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]


@dataclasses.dataclass(frozen=True)
class LoopResult:
    """Where the loop ended."""

    state: TrainState
    step: int
    is_finished: bool  # False: asked to stop before the last step


@dataclasses.dataclass(frozen=True)
class LoopServices:
    """What goes along with the steps.

    Attributes:
      hooks: called in this order after the steps they are due at.
      recorder: takes every step's metrics.
      writer: takes what the hooks return.
      progress: shows the step.
      stop: asked after every step whether to leave.
      log_every_steps: interval of reports.
    """

    hooks: Sequence[Hook]
    recorder: MetricRecorder
    writer: MetricWriter
    progress: Progress
    stop: StopRequest
    log_every_steps: int


def train_loop(
    state: TrainState,
    train_step: StepFunction,
    batches: Iterator[Any],
    services: LoopServices,
    *,
    start_step: int,
    total_steps: int,
) -> LoopResult:
    """Runs steps `start_step + 1` to `total_steps`.

    Steps stay asynchronous: the host waits for the device only at log points and where a hook
    does. Any transfer that is not asked for by name is an error inside the step.

    Args:
      state: the train state after `start_step` steps; it is donated.
      train_step: compiled, (state, batch) -> (state, metrics).
      batches: on the mesh, endless.
      services: what goes along.
      start_step: steps done before.
      total_steps: steps of the whole run.

    Raises:
      RuntimeError: if the batches end early.
      TooManyBadSteps: if too many steps in a row were not finite.
    """
    recorder, progress = services.recorder, services.progress
    for step in range(start_step + 1, total_steps + 1):
        progress.advance(step)
        batch = _next_batch(batches, step)
        with jax.transfer_guard("disallow"):
            state, metrics = train_step(state, batch)
        recorder.add(step, metrics)

        is_last = step == total_steps
        is_stopping = services.stop.is_due(step) and not is_last
        is_report = is_last or is_stopping or step % services.log_every_steps == 0
        due = [
            hook
            for hook in services.hooks
            if is_due(hook, step, is_last=is_last, is_stopping=is_stopping)
            or (is_report and isinstance(hook, TimedHook) and hook.is_wanted())
        ]
        if is_report:
            recorder.report(step)
        elif due:
            recorder.flush()  # A checkpoint must find its steps in the metrics file.
        if due and recorder.skipped_in_row and not (is_last or is_stopping):
            due = [hook for hook in due if not hook.skips_bad_steps]
        if due:
            _call(due, step, state, services.writer)
            progress.resume(step)
        if is_stopping:
            return LoopResult(state, step, is_finished=False)
    return LoopResult(state, max(start_step, total_steps), is_finished=True)


def _next_batch(batches: Iterator[Any], step: int) -> Any:
    with contextlib.suppress(StopIteration):
        return next(batches)
    raise RuntimeError(
        f"the training data ended before step {step}; the pipeline of the training split must "
        "repeat its records"
    )


def _call(hooks: Sequence[Hook], step: int, state: TrainState, writer: MetricWriter) -> None:
    scalars: dict[str, float] = {}
    for hook in hooks:
        scalars.update(hook(step, state, scalars))
    if scalars:
        writer.write_scalars(step, scalars)
