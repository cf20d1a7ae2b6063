"""One training run from its config: assemble, resume, step, loop, summary."""

import contextlib
import dataclasses
import math
import pathlib
import tempfile
from collections.abc import Iterator, Mapping
from typing import Any

import jax
from absl import logging
from rich.console import Console

from megatransformer_jax.checkpoints.compatibility import flatten_config
from megatransformer_jax.checkpoints.manager import CheckpointManager
from megatransformer_jax.checkpoints.save_times import SaveTimer, SaveTimes
from megatransformer_jax.config.build import save_config, to_dict
from megatransformer_jax.config.run import RunConfig
from megatransformer_jax.config.run_base import TASKS, BaseRunConfig
from megatransformer_jax.config.run_kinds import VaeRunConfig, VocoderRunConfig
from megatransformer_jax.evaluation.validation import ScoreHook
from megatransformer_jax.failures import SaveFailed, is_full, storage_problem
from megatransformer_jax.runs.build import (
    MemoryPlan,
    check_augmentation,
    count_parameters,
    plan_memory,
)
from megatransformer_jax.runs.lease import Lease, lease_of
from megatransformer_jax.runs.mirror import Mirror
from megatransformer_jax.runs.task import Task
from megatransformer_jax.runs.tasks.image_vae import ImageVaeTask
from megatransformer_jax.runs.tasks.media import MediaTask
from megatransformer_jax.runs.tasks.start import check_workdir, run_info, start_state
from megatransformer_jax.runs.tasks.text import ReasoningTask, TextTask
from megatransformer_jax.runs.tasks.vocoder import VocoderTask
from megatransformer_jax.runs.workdir import (
    LOCKED_FILE,
    Workdir,
    hold_workdir,
    log_file,
    make_workdir,
    use_compilation_cache,
)
from megatransformer_jax.sharding.mesh import describe_layout
from megatransformer_jax.storage import as_path, is_bucket_path, make_and_probe
from megatransformer_jax.training.distributed import (
    LostProcess,
    naming_lost_processes,
    start_distributed,
)
from megatransformer_jax.training.evaluation_params import evaluation_params
from megatransformer_jax.training.loop import (
    CheckHook,
    CheckpointHook,
    Hook,
    LoopResult,
    LoopServices,
    StopRequest,
    train_loop,
)
from megatransformer_jax.training.optimizers import build_schedule
from megatransformer_jax.training.progress import build_progress
from megatransformer_jax.training.recorder import METRICS_FILE, MetricRecorder, MetricsFile
from megatransformer_jax.training.state import TrainState
from megatransformer_jax.training.trainable import split_params
from megatransformer_jax.training.writers import build_writer


def train(config: BaseRunConfig) -> LoopResult:
    """Trains until `train.steps`, resuming if the workdir has a checkpoint.

    Raises:
      UserError: see `Run`.
      LostProcess: if another process of the run has ended or cannot be reached.
    """
    with contextlib.ExitStack() as stack, naming_lost_processes():
        return Run(config, stack).finish()


class Run:
    """A run of any kind that holds its workdir: it starts or goes on, steps, saves and ends.

    Args:
      config: of the run.
      stack: closes what the run holds: locks, files, data, checkpoints.
      is_kept: False: the run has no workdir, writes no checkpoints, metrics or logs, and what
        it must put into files (its tokenizer) goes when the stack is closed.

    Attributes:
      config: with what building the run has resolved.
      task: model, data and what the model is judged by.
      state: the train state after `step` steps. Each step donates it.
      step: optimiser steps done.

    Raises:
      UserError: if the run cannot start, or not go on from what the workdir holds.
    """

    def __init__(self, config: BaseRunConfig, stack: contextlib.ExitStack, *, is_kept: bool = True):
        use_compilation_cache(config.compilation_cache_dir)
        start_distributed(config.distributed)
        check_augmentation(config)
        self._stack = stack
        self._is_kept = is_kept
        self._is_primary = jax.process_index() == 0
        self._console = Console()
        self._mirror: Mirror | None = None
        self._lease: Lease | None = None
        if is_kept:
            self.workdir = self._open_workdir(config)
            # It was for this start; `config.json` starts others.
            config = dataclasses.replace(config, steal_lock=False)
        else:
            folder = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory()))
            self.workdir = Workdir(folder, folder)
            unwritten = dataclasses.replace(
                config.logging, writers=(), wandb_project=None, mirror=None
            )
            config = dataclasses.replace(config, logging=unwritten)
        if self._is_primary and is_kept:
            log = self.workdir.files / LOCKED_FILE
            stack.enter_context(log_file(log, config.logging.level))
            if not is_bucket_path(self.workdir.root):  # There the lease holds it.
                stack.enter_context(hold_workdir(self.workdir.root))
        self._checkpoints = CheckpointManager(
            self.workdir.root / "checkpoints",
            config.checkpoint,
            None if self._lease is None else self._lease.confirm,
        )
        stack.push(self._close_checkpoints)
        self._save_times = SaveTimes(self._checkpoints.join)
        config, plan = plan_memory(config, self._checkpoints)
        check_workdir(config, self._checkpoints)
        self.task: Task = open_task(config, self.workdir, stack, plan)
        self.config = self.task.config
        self.state, self.step = start_state(self.task, self._checkpoints)
        self._log_overview()
        self._open_records()
        self._step_function = self.task.step_function()
        self._has_stepped = False

    def _open_workdir(self, config: BaseRunConfig) -> Workdir:
        """Makes the run's folder. If it is in a bucket, what goes there by copies is fetched."""
        root, copy = make_workdir(config.workdir), config.logging.mirror
        files, target = root, root
        if is_bucket_path(root):
            files = pathlib.Path(self._stack.enter_context(tempfile.TemporaryDirectory()))
        elif copy is not None and self._is_primary:
            target = make_and_probe("logging.mirror", as_path("logging.mirror", copy))
        if is_bucket_path(target) and self._is_primary:
            lease = lease_of(target, config.lock_owner, steals=config.steal_lock)
            self._lease = self._stack.enter_context(lease)
            mirror = Mirror(
                files, target, is_workdir=target == root, may_write=lambda: not lease.is_lost
            )
            self._mirror = self._stack.enter_context(mirror)
        return Workdir(root, files)

    def _close_checkpoints(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: Any
    ) -> None:
        """Unless another process is lost: a save that goes on would wait for it."""
        if not isinstance(error, LostProcess):
            self._save_times.finish()
            self._checkpoints.close()

    def _open_records(self) -> None:
        """What metrics go to: writers, the metrics file, the screen."""
        config = self.config
        self._writer = build_writer(
            config.logging,
            self.workdir.files,
            is_primary=self._is_primary,
            start_step=self.step + 1 if self.step else 0,
        )
        self._stack.callback(self._writer.close)
        self._writer.write_hparams(flatten_config(to_dict(config)))
        self._progress = build_progress(
            config.logging.progress, self._console, config.train.steps, is_primary=self._is_primary
        )
        metrics_file = None
        if self._is_primary and self._is_kept:
            metrics_file = MetricsFile(self.workdir.files / METRICS_FILE, self.step)
            self._stack.callback(metrics_file.close)
            # Not before everything that a bad option could stop: a start that fails must leave
            # the config of the run that the workdir holds.
            save_config(config, self.workdir.files / "config.json")
            if self._mirror is not None:
                self._mirror.start()
        self._recorder = MetricRecorder(
            metrics_file=metrics_file,
            writer=self._writer,
            progress=self._progress,
            learning_rate=build_schedule(config.optimizer, config.train.steps),
            max_bad_steps=config.train.max_bad_steps,
            on_report=None if self._mirror is None else self._mirror.request,
        )

    def advance(self, batch: Any = None) -> dict[str, float]:
        """One step, without hooks; returns its metrics.

        Args:
          batch: on the host, of this process. None: the next one of the run's data.

        Raises:
          TooManyBadSteps: if too many steps in a row were not finite.
        """
        if not self._has_stepped:
            logging.info("compiling the train step ...")
            self._has_stepped = True
        host = next(self.task.batches) if batch is None else batch
        placed = self.task.place_batch(host)
        with jax.transfer_guard("disallow"):
            self.state, metrics = self._step_function(self.state, placed)
        self.step += 1
        self._recorder.add(self.step, metrics)
        self._recorder.flush()
        return dict(self._recorder.last)

    def finish(self) -> LoopResult:
        """Steps to the end of the run, with its hooks, then the summary.

        Raises:
          SaveFailed: if something of the run cannot be written.
          TooManyBadSteps: if too many steps in a row were not finite.
        """
        with self._writing():
            return self._finish()

    def _finish(self) -> LoopResult:
        if self.step >= self.config.train.steps:
            logging.info("all %d steps are done; raise train.steps to go on.", self.step)
        result = self._loop()
        self._wait_for_saves()
        if not result.is_finished:
            logging.warning(
                "stopped after step %d of %d; everything is saved. The same command resumes.",
                result.step,
                self.config.train.steps,
            )
            return result
        console = self._console if self._is_primary else None
        self.task.summarize(self.params_of(result.state), console)
        return result

    def _loop(self) -> LoopResult:
        leave = None if self._lease is None else self._lease.release
        stop_request = StopRequest(has_steps=self.has_unsaved_steps, before_exit=leave)
        with self._progress, stop_request as stop:
            services = LoopServices(
                hooks=self._hooks(),
                recorder=self._recorder,
                writer=self._writer,
                progress=self._progress,
                stop=stop,
                log_every_steps=self.config.logging.every_steps,
            )
            result = train_loop(
                self.state,
                self._step_function,
                map(self.task.place_batch, self.task.batches),
                services,
                start_step=self.step,
                total_steps=self.config.train.steps,
            )
        self.state, self.step = result.state, result.step
        if result.is_finished:
            _warn_of_bad_steps(result, self._recorder.last_loss)
        return result

    def _hooks(self) -> list[Hook]:
        """Validation comes before the checkpoint, which is saved with its scores."""

        checks = [CheckHook(self.config.logging.every_steps, self._check)]
        saving = self.config.checkpoint
        timer = None if saving.every_minutes is None else SaveTimer(saving.every_minutes)
        checkpoints = [CheckpointHook(saving.every_steps, self._save, timer)]
        return [
            *(checks if self._is_kept else []),
            ScoreHook(self.config.evaluation.every_steps, self.task.scores, self.params_of),
            *(checkpoints if self._is_kept else []),
            *self.task.observers(self.params_of, self._writer),
        ]

    def _check(self) -> None:
        """Raises what has failed in the background."""
        if self._lease is not None:
            self._lease.check()
        self._checkpoints.check()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Says in one line what could not be written for a full disk, and what is saved."""
        try:
            yield
        except OSError as error:
            if not is_full(error):
                raise
            raise SaveFailed(
                f"{self.workdir.files} cannot be written to ({storage_problem(error)}). "
                f"{self._checkpoints.way_out(error)}"
            ) from error

    @property
    def has_unsaved_steps(self) -> bool:
        """Whether there are steps that no checkpoint has."""
        return self.step > (self._checkpoints.latest_step() or 0)

    def save(self) -> None:
        """Saves a checkpoint of the present step, unless there is one, and waits for it."""
        if self._checkpoints.latest_step() != self.step:
            self._save(self.step, self.state, {})
        self._wait_for_saves()

    def _save(
        self, step: int, state: TrainState, scores: Mapping[str, float]
    ) -> Mapping[str, float]:
        """Starts a save; returns how long it, and the one before, took."""
        if self._lease is not None:
            self._lease.confirm()  # What is copied would replace another run's records.
        if self._mirror is not None:
            self._mirror.send_records()
        info = run_info(self.config, self.task.digest)
        with self._save_times.measure(step):
            self._checkpoints.save(step, state, self.task.batches.get_state(), info, scores)
        return self._save_times.take()

    def _wait_for_saves(self) -> None:
        self._checkpoints.wait()
        self._save_times.finish()

    def params_of(self, state: TrainState) -> Any:
        """The parameters that validation, samples and the summary use."""
        return evaluation_params(state, self.config)

    def _log_overview(self) -> None:
        counts = count_parameters(self.state.params)
        parts = ", ".join(f"{name} {count:,}" for name, count in counts.items())
        assert self.task.sharder.mesh is not None  # `open_task` always makes one.
        mesh = self.task.sharder.mesh
        layout = describe_layout(mesh)
        logging.info("parameters: %s (%s)", f"{sum(counts.values()):,}", parts)
        trained, frozen = split_params(self.state.params, self.config.trained_parts)
        if jax.tree.leaves(frozen):
            count = sum(leaf.size for leaf in jax.tree.leaves(trained))
            logging.info("trained of these: %s", f"{count:,}")
        logging.info(
            "mesh: %s on %s%s; %s; workdir: %s",
            " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items()),
            jax.devices()[0].device_kind,
            f" ({layout})" if layout else "",
            self.task.facts,
            self.workdir.root if self._is_kept else "none",
        )


def _warn_of_bad_steps(result: LoopResult, last_loss: float | None) -> None:
    """Tells at the end of a run what is easily overlooked among its lines."""
    skipped = int(result.state.skipped_steps)
    if skipped:
        logging.warning(
            "the updates of %d of %d steps were skipped because their loss or gradients were not "
            "finite; metrics.jsonl shows which (skipped_in_row above 0).",
            skipped,
            result.step,
        )
    if last_loss is not None and not math.isfinite(last_loss):
        logging.warning("the loss of the last step is not finite: %s.", last_loss)


def open_task(
    config: BaseRunConfig,
    workdir: Workdir,
    stack: contextlib.ExitStack,
    plan: MemoryPlan | None,
) -> Task:
    """Builds model, data and what the model is judged by.

    Args:
      config: of the run.
      workdir: exists.
      stack: closes the data when the run ends.
      plan: of `train.memory_budget_gib`.

    Raises:
      UserError: if model, data and devices do not fit each other.
      ValueError: if the task is unknown.
    """
    match config:
        case VocoderRunConfig():
            return VocoderTask(config, workdir, stack, plan)
        case VaeRunConfig():
            return ImageVaeTask(config, workdir, stack, plan)
        case RunConfig() if config.task in _TRANSFORMER_TASKS:
            return _TRANSFORMER_TASKS[config.task](config, workdir, stack, plan)
    raise ValueError(f"unknown task {config.task!r}; known: {', '.join(TASKS)}")


_TRANSFORMER_TASKS = {"text": TextTask, "reasoning": ReasoningTask, "media": MediaTask}
