"""One training run from its config: assemble, resume, loop, summary."""

import contextlib
import math
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
from absl import logging
from rich.console import Console

from megatransformer_jax.checkpoints.compatibility import flatten_config
from megatransformer_jax.checkpoints.manager import CheckpointManager
from megatransformer_jax.config.build import save_config, to_dict
from megatransformer_jax.config.run import RunConfig
from megatransformer_jax.runs.build import check_augmentation, count_parameters, plan_memory
from megatransformer_jax.runs.task import RunKind
from megatransformer_jax.runs.tasks.build import build_run
from megatransformer_jax.runs.tasks.start import check_workdir, run_info, start_state
from megatransformer_jax.runs.workdir import hold_workdir, log_file, make_folder, make_workdir
from megatransformer_jax.training.distributed import start_distributed
from megatransformer_jax.training.evaluation_params import evaluation_params
from megatransformer_jax.training.loop import (
    CheckpointHook,
    Hook,
    LoopResult,
    StopRequest,
    train_loop,
)
from megatransformer_jax.training.optimizers import build_schedule
from megatransformer_jax.training.progress import build_progress
from megatransformer_jax.training.recorder import MetricRecorder, MetricsFile
from megatransformer_jax.training.state import TrainState
from megatransformer_jax.training.trainable import split_params
from megatransformer_jax.training.writers import MultiWriter, build_writer


def train(config: RunConfig) -> LoopResult:
    """Trains until `train.steps`, resuming if the workdir has a checkpoint."""
    if config.compilation_cache_dir is not None:
        cache = make_folder("compilation_cache_dir", config.compilation_cache_dir)
        jax.config.update("jax_compilation_cache_dir", str(cache))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    start_distributed(config.distributed)
    check_augmentation(config)
    workdir = make_workdir(config.workdir)
    is_primary = jax.process_index() == 0
    with contextlib.ExitStack() as stack:
        if is_primary:
            stack.enter_context(log_file(workdir / "train.log", config.logging.level))
            stack.enter_context(hold_workdir(workdir))
        checkpoints = CheckpointManager(workdir / "checkpoints", config.checkpoint)
        stack.callback(checkpoints.close)
        config, plan = plan_memory(config, checkpoints)
        check_workdir(config, checkpoints)
        kind = build_run(config, workdir, stack, plan)
        return _Run(kind, workdir, checkpoints, stack).train()


class _Run:
    """One run of any kind: starts it, or goes on with it, and ends it."""

    def __init__(
        self,
        kind: RunKind,
        workdir: pathlib.Path,
        checkpoints: CheckpointManager,
        stack: contextlib.ExitStack,
    ):
        self.kind = kind
        self.config = kind.config
        self.workdir = workdir
        self.checkpoints = checkpoints
        self.stack = stack
        self.console = Console()
        self.is_primary = jax.process_index() == 0

    def train(self) -> LoopResult:
        state, start_step = start_state(self.kind, self.checkpoints)
        self._log_overview(state)
        writer = build_writer(
            self.config.logging,
            self.workdir,
            is_primary=self.is_primary,
            start_step=start_step + 1 if start_step else 0,
        )
        self.stack.callback(writer.close)
        writer.write_hparams(flatten_config(to_dict(self.config)))
        result = self._loop(state, start_step, writer)
        self.checkpoints.wait()
        if not result.is_finished:
            logging.warning(
                "stopped after step %d of %d; everything is saved. The same command resumes.",
                result.step,
                self.config.train.steps,
            )
            return result
        console = self.console if self.is_primary else None
        self.kind.summarize(self.params_of(result.state), console)
        return result

    def _loop(self, state: TrainState, start_step: int, writer: MultiWriter) -> LoopResult:
        config = self.config
        progress = build_progress(
            config.logging.progress, self.console, config.train.steps, is_primary=self.is_primary
        )
        metrics_file = None
        if self.is_primary:
            metrics_file = MetricsFile(self.workdir / "metrics.jsonl", start_step)
            self.stack.callback(metrics_file.close)
            # Not before everything that a bad option could stop: a start that fails must leave
            # the config of the run that the workdir holds.
            save_config(config, self.workdir / "config.json")
        recorder = MetricRecorder(
            metrics_file=metrics_file,
            writer=writer,
            progress=progress,
            learning_rate=build_schedule(config.optimizer, config.train.steps),
            max_bad_steps=config.train.max_bad_steps,
        )
        with progress, StopRequest() as stop:
            result = train_loop(
                state,
                self.kind.step_function(),
                self.kind.batches,
                self.kind.place_batch,
                self._hooks(writer),
                recorder=recorder,
                writer=writer,
                progress=progress,
                stop=stop,
                start_step=start_step,
                total_steps=config.train.steps,
                log_every_steps=config.logging.every_steps,
            )
        if result.is_finished:
            _warn_of_bad_steps(result, recorder.last_loss)
        return result

    def _hooks(self, writer: MultiWriter) -> list[Hook]:
        """Validation comes before the checkpoint, which is saved with its scores."""
        config = self.config
        run = run_info(config, self.kind.vocabulary)

        def save(step: int, state: TrainState, scores: Mapping[str, float]) -> None:
            self.checkpoints.save(step, state, self.kind.batches.get_state(), run, scores)

        return [
            *self.kind.judges(self.params_of),
            CheckpointHook(config.checkpoint.every_steps, save),
            *self.kind.observers(self.params_of, writer),
        ]

    def params_of(self, state: TrainState) -> Any:
        """The parameters that validation, samples and the summary use."""
        return evaluation_params(state, self.config)

    def _log_overview(self, state: TrainState) -> None:
        counts = count_parameters(state.params)
        parts = ", ".join(f"{name} {count:,}" for name, count in counts.items())
        assert self.kind.sharder.mesh is not None  # `assemble` always makes one.
        mesh_shape = self.kind.sharder.mesh.shape
        logging.info("parameters: %s (%s)", f"{sum(counts.values()):,}", parts)
        trained, frozen = split_params(state.params, self.config.fine_tuning)
        if jax.tree.leaves(frozen):
            count = sum(leaf.size for leaf in jax.tree.leaves(trained))
            logging.info("trained of these: %s", f"{count:,}")
        logging.info(
            "mesh: %s on %s; %s; workdir: %s",
            " x ".join(f"{axis} {size}" for axis, size in mesh_shape.items()),
            jax.devices()[0].device_kind,
            self.kind.facts,
            self.workdir,
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
