"""The training loop: step, record, hooks. It builds nothing and knows no hook."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax

from megatransformer_jax.training.hooks import Hook, is_due
from megatransformer_jax.training.metric_interface import MetricWriter
from megatransformer_jax.training.progress import Progress
from megatransformer_jax.training.recorder import MetricRecorder
from megatransformer_jax.training.state import TrainState
from megatransformer_jax.training.stop import StopRequest
from megatransformer_jax.types import Batch

StepFunction = Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]


@dataclasses.dataclass(frozen=True)
class LoopResult:
    """Where the loop ended."""

    state: TrainState
    step: int
    is_finished: bool  # False: asked to stop before the last step


def train_loop(
    state: TrainState,
    train_step: StepFunction,
    batches: Iterator[Any],
    place_batch: Callable[[Any], Batch],
    hooks: Sequence[Hook],
    *,
    recorder: MetricRecorder,
    writer: MetricWriter,
    progress: Progress,
    stop: StopRequest,
    start_step: int,
    total_steps: int,
    log_every_steps: int,
) -> LoopResult:
    """Runs steps `start_step + 1` to `total_steps`.

    Steps stay asynchronous: the host waits for the device only at log points and where a hook
    does. Any transfer that is not asked for by name is an error inside the step.

    Args:
      state: the train state after `start_step` steps; it is donated.
      train_step: compiled, (state, batch) -> (state, metrics).
      batches: host batches, endless.
      place_batch: puts a host batch onto the mesh.
      hooks: called in this order after the steps they are due at.
      recorder: takes every step's metrics.
      writer: takes what the hooks return.
      progress: shows the step.
      stop: asked after every step whether to leave.
      start_step: steps done before.
      total_steps: steps of the whole run.
      log_every_steps: interval of reports.

    Raises:
      RuntimeError: if the batches end early.
      TooManyBadSteps: if too many steps in a row were not finite.
    """
    for step in range(start_step + 1, total_steps + 1):
        progress.advance(step)
        batch = place_batch(_next_batch(batches, step))
        with jax.transfer_guard("disallow"):
            state, metrics = train_step(state, batch)
        recorder.add(step, metrics)

        is_last = step == total_steps
        is_stopping = stop.is_due(step) and not is_last
        due = [h for h in hooks if is_due(h, step, is_last=is_last, is_stopping=is_stopping)]
        if is_last or is_stopping or step % log_every_steps == 0:
            recorder.report(step)
        elif due:
            recorder.flush()  # A checkpoint must find its steps in the metrics file.
        if due and recorder.skipped_in_row and not (is_last or is_stopping):
            due = [hook for hook in due if not hook.skips_bad_steps]
        if due:
            _call(due, step, state, writer)
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
