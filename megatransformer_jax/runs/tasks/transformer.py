"""What all tasks of a transformer have in common: model, state, train step, table by depth."""

import abc
import contextlib
import functools
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
from absl import logging
from rich import box
from rich.console import Console
from rich.table import Table

from megatransformer_jax import streams
from megatransformer_jax.config.run import RunConfig
from megatransformer_jax.data.media.records import MediaFormats
from megatransformer_jax.data.pipeline import build_pipeline, validation_batches
from megatransformer_jax.evaluation.depth_table import (
    evaluated_depths,
    make_table,
    score_depths,
    write_depth_table,
)
from megatransformer_jax.evaluation.diagnostics.kinds import DiagnosticsHook, make_subject
from megatransformer_jax.evaluation.validation import (
    TEXT_SCORES,
    ValidationSet,
    make_eval_step,
    scores_by_name,
)
from megatransformer_jax.models.attention_kernels import describe_choices
from megatransformer_jax.runs.build import (
    MemoryPlan,
    abstract_batches,
    abstract_train_state,
    build_sharded_model,
    trained_depth,
    training_kernels,
)
from megatransformer_jax.runs.task import ParamsOf
from megatransformer_jax.runs.tasks.start import fresh_state
from megatransformer_jax.runs.tokenizers import start_tokenizer
from megatransformer_jax.runs.workdir import Workdir
from megatransformer_jax.sharding.mesh import share_of_batch
from megatransformer_jax.training.distributed import make_global_batch
from megatransformer_jax.training.loop import Hook, StepFunction
from megatransformer_jax.training.micro_batch import CompiledStep
from megatransformer_jax.training.optimizers import build_optimizer
from megatransformer_jax.training.state import TrainState
from megatransformer_jax.training.step import make_train_step
from megatransformer_jax.training.writers import MultiWriter
from megatransformer_jax.types import Batch

LOG_WIDTH = 100


class TransformerTask(abc.ABC):
    """A `Task` but for what is shown.

    Attributes:
      shown: names of the scores in validation, table and plot.
      tokenizer: between the data and ids.
      validation_set: held-out batches, on the mesh.
    """

    shown: Sequence[str] = TEXT_SCORES

    def __init__(
        self,
        config: RunConfig,
        workdir: Workdir,
        stack: contextlib.ExitStack,
        plan: MemoryPlan | None,
    ):
        self.config = config
        self.workdir = workdir
        self.tokenizer = start_tokenizer(config, workdir.root)
        self.digest = self.tokenizer.digest()
        self.facts = f"vocabulary: {self.tokenizer.vocab_size}"
        self.model, self.sharder = build_sharded_model(config)
        logging.info("attention: %s", describe_choices(training_kernels(config, self.model)))
        if self.sharder.fills_heads:
            logging.info(
                "heads: the model has %d key/value heads, and devices compute %d, so that "
                "mesh.tensor divides them",
                *self.sharder.heads,
            )
        self._optimizer = build_optimizer(
            config.optimizer, config.train.steps, config.train.ema_decay
        )
        self._compiled_step: CompiledStep | None = None
        if plan is not None:
            self.config, self._compiled_step = plan.compile(
                config,
                functools.partial(make_train_step, self.model, self._optimizer),
                self.abstract_state(),
                abstract_batches(config, self.sharder),
                self.sharder,
            )
        assert self.sharder.mesh is not None  # `build_sharded_model` makes one.
        part, parts = share_of_batch(self.sharder.mesh, jax.process_index())
        data: dict[str, Any] = {
            "media": MediaFormats.of_model(config.model),
            "process_index": part,
            "process_count": parts,
        }
        self.batches = build_pipeline(config.data, self.tokenizer, split="train", **data)
        stack.callback(self.batches.close)
        held_out = validation_batches(
            config.data, self.tokenizer, num_batches=config.evaluation.num_batches, **data
        )
        eval_step = jax.jit(make_eval_step(self.model, self.validation_key))
        self.validation_set = ValidationSet(list(map(self.place_batch, held_out)), eval_step)
        # Made at the start, so that a bad option stops the run here and not at its first sample.
        self.sample = self.make_sampler()

    def abstract_state(self) -> TrainState:
        """See `Task`."""
        return abstract_train_state(
            self.model, self._optimizer, self.sharder, self.config.fine_tuning
        )

    def fresh_state(self) -> TrainState:
        """See `Task`."""
        return fresh_state(
            self.config, self.model, self._optimizer, self.sharder, self.tokenizer, self.batches
        )

    def step_function(self) -> StepFunction:
        """See `Task`."""
        return self._compiled_step or jax.jit(
            make_train_step(self.model, self._optimizer, self.config), donate_argnums=0
        )

    def place_batch(self, batch: Batch) -> Batch:
        """See `Task`."""
        return make_global_batch(batch, self.sharder)

    def scores(self, params: Any) -> dict[str, float]:
        """See `Task`."""
        scores = self.validation_set.score(params, trained_depth(self.config))
        return scores_by_name(scores, self.shown)

    @abc.abstractmethod
    def make_sampler(self) -> Callable[[Any, int], Any]:
        """A function from (params, step) to samples, for all processes to call together."""

    @abc.abstractmethod
    def sample_hook(self, make_samples: Callable[[Any, int], Any], writer: MultiWriter) -> Hook:
        """Shows what the function from (state, step) makes."""

    def observers(self, params_of: ParamsOf, writer: MultiWriter) -> list[Hook]:
        """Samples, and diagnostics if there are any."""
        samples = self.sample_hook(lambda state, step: self.sample(params_of(state), step), writer)
        if not self.config.diagnostics.every_steps:
            return [samples]
        batch = self.validation_set.batches[0]
        subject = make_subject(self.config, self.model, batch, self.sharder)
        return [samples, DiagnosticsHook(subject, params_of, writer, self.folder("diagnostics"))]

    def final_texts(self, params: Any, depths: Sequence[int | None]) -> list[str]:
        """Texts that are printed above the table of the summary."""
        del params, depths
        return []

    def summarize(self, params: Any, console: Console | None) -> None:
        """Scores the validation set at every depth; the primary process shows and writes it.

        The folder gets depth_table.json and depth_table.png; the table is added to train.log.
        """
        depths, mean = evaluated_depths(self.config), trained_depth(self.config)
        scores = score_depths(params, self.validation_set, depths)
        texts = self.final_texts(params, depths)
        if console is None:
            return
        for text in texts:
            console.print(text, markup=False, highlight=False)
        table = make_table(scores, mean, self.shown)
        console.print(table)
        _append(self.workdir.files / "train.log", table)
        paths = write_depth_table(self.workdir.files, scores, mean, self.shown)
        logging.info("table and plot: %s, %s", *map(self.workdir.final, paths))

    def folder(self, name: str) -> pathlib.Path | None:
        """Of the workdir, for the process that writes."""
        return self.workdir.files / name if jax.process_index() == 0 else None

    @functools.cached_property
    def validation_key(self) -> jax.Array:
        """A separate key: folding in the largest step keeps clear of every training step."""
        return jax.random.fold_in(jax.random.key(self.config.train.seed), streams.VALIDATION)


def _append(path: pathlib.Path, table: Table) -> None:
    """Adds a table in plain characters; not through the log, because the screen has its own."""
    table.box = box.ASCII
    with open(path, "a", encoding="utf-8") as file:
        Console(file=file, width=LOG_WIDTH).print(table)
