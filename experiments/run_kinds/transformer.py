"""Runs that train the transformer, on text, reasoning problems or media."""

import contextlib
import pathlib
from collections.abc import Callable
from typing import Any

import jax
from rich.console import Console

from experiments import assemble, resume
from experiments.media_samples import make_media_sampler
from experiments.memory_plan import MemoryPlan
from experiments.run_kinds.run_kind import ParamsOf
from experiments.samples import make_sampler
from experiments.summary import summarize
from megatransformer_jax.config.run import RunConfig
from megatransformer_jax.data.batches import Pipeline
from megatransformer_jax.data.media.rows import task_names
from megatransformer_jax.data.pipeline import build_pipeline, validation_batches
from megatransformer_jax.evaluation.diagnostics.kinds import DiagnosticsHook, make_subject
from megatransformer_jax.evaluation.media.validation import (
    MediaValidationHook,
    MediaValidationSet,
    make_media_eval_step,
)
from megatransformer_jax.evaluation.validation import ValidationHook, ValidationSet, make_eval_step
from megatransformer_jax.training.distributed import make_global_batch
from megatransformer_jax.training.loop import Hook, SampleHook, StepFunction
from megatransformer_jax.training.media_hook import MediaSampleHook
from megatransformer_jax.training.micro_batch import CompiledStep
from megatransformer_jax.training.optimizers import build_optimizer
from megatransformer_jax.training.state import TrainState
from megatransformer_jax.training.step import make_train_step
from megatransformer_jax.training.writers import MultiWriter
from megatransformer_jax.types import Batch


class TransformerRun:
    """A `RunKind`."""

    def __init__(
        self,
        config: RunConfig,
        workdir: pathlib.Path,
        stack: contextlib.ExitStack,
        plan: MemoryPlan | None,
    ):
        self.config = config
        self._workdir = workdir
        self._processes = {
            "process_index": jax.process_index(),
            "process_count": jax.process_count(),
        }
        self.vocabulary = assemble.build_vocabulary(config, workdir)
        self.facts = f"vocabulary: {self.vocabulary.size}"
        self.model, self.sharder = assemble.build_sharded_model(config)
        self._optimizer = build_optimizer(
            config.optimizer, config.train.steps, config.train.ema_decay
        )
        self._compiled_step: CompiledStep | None = None
        if plan is not None:
            self.config, self._compiled_step = plan.compile(
                config, self.model, self._optimizer, self.sharder
            )
        self.batches = self._open_pipeline()
        stack.callback(self.batches.close)
        self.validation_set = self._build_validation_set()
        self._sampler = self._build_sampler()

    def abstract_state(self) -> TrainState:
        """See `RunKind`."""
        return assemble.abstract_train_state(
            self.model, self._optimizer, self.sharder, self.config.fine_tuning
        )

    def fresh_state(self) -> TrainState:
        """See `RunKind`."""
        return resume.fresh_state(
            self.config, self.model, self._optimizer, self.sharder, self.vocabulary, self.batches
        )

    def step_function(self) -> StepFunction:
        """See `RunKind`."""
        return self._compiled_step or jax.jit(
            make_train_step(self.model, self._optimizer, self.config), donate_argnums=0
        )

    def place_batch(self, batch: Batch) -> Batch:
        """See `RunKind`."""
        return make_global_batch(batch, self.sharder)

    def judges(self, params_of: ParamsOf) -> list[Hook]:
        """See `RunKind`."""
        if self.config.model.has_media:
            return [
                MediaValidationHook(
                    self.config.evaluation.every_steps,
                    self._build_media_validation_set(),
                    assemble.trained_depth(self.config),
                    params_of,
                )
            ]
        return [
            ValidationHook(
                self.config.evaluation.every_steps,
                self.validation_set,
                assemble.trained_depth(self.config),
                params_of,
                is_reasoning=self.vocabulary.tokenizer is None,
            )
        ]

    def observers(self, params_of: ParamsOf, writer: MultiWriter) -> list[Hook]:
        """Samples, and diagnostics if there are any."""
        samples = self._sample_hook(params_of, writer)
        if not self.config.diagnostics.every_steps:
            return [samples]
        batch = self.validation_set.batches[0]
        subject = make_subject(self.config, self.model, batch, self.sharder)
        return [samples, DiagnosticsHook(subject, params_of, writer, self._folder("diagnostics"))]

    def summarize(self, params: Any, console: Console | None) -> None:
        """See `RunKind`."""
        summarize(self.config, self._workdir, params, self.validation_set, self.vocabulary, console)

    def _build_sampler(self) -> Callable[[Any, int], Any]:
        config, model, vocabulary = self.config, self.model, self.vocabulary
        if config.model.has_media:
            return make_media_sampler(config, model, vocabulary, self.validation_set.batches[0])
        return make_sampler(config, model, vocabulary, self.validation_set)

    def _sample_hook(self, params_of: ParamsOf, writer: MultiWriter) -> Hook:
        every_steps = self.config.samples.every_steps

        def sample(state: TrainState, step: int) -> Any:
            return self._sampler(params_of(state), step)

        if self.config.model.has_media:
            return MediaSampleHook(every_steps, sample, writer, self._folder("samples"))
        return SampleHook(every_steps, sample, writer.write_texts)

    def _folder(self, name: str) -> pathlib.Path | None:
        """Of the workdir, for the process that writes."""
        return self._workdir / name if jax.process_index() == 0 else None

    def _open_pipeline(self) -> Pipeline:
        return build_pipeline(
            self.config.data,
            self.vocabulary.tokenizer,
            split="train",
            media=assemble.media_formats(self.config),
            **self._processes,
        )

    def _build_validation_set(self) -> ValidationSet:
        batches = validation_batches(
            self.config.data,
            self.vocabulary.tokenizer,
            num_batches=self.config.evaluation.num_batches,
            media=assemble.media_formats(self.config),
            **self._processes,
        )
        eval_step = jax.jit(make_eval_step(self.model, self._validation_key()))
        return ValidationSet([self.place_batch(batch) for batch in batches], eval_step)

    def _build_media_validation_set(self) -> MediaValidationSet:
        names = task_names(self.config.data)
        eval_step = make_media_eval_step(self.model, self._validation_key(), len(names))
        return MediaValidationSet(self.validation_set.batches, jax.jit(eval_step), names)

    def _validation_key(self) -> jax.Array:
        """A key of its own: folding in the largest step keeps clear of every training step."""
        return jax.random.fold_in(jax.random.key(self.config.train.seed), 2**32 - 1)
