"""Runs that train the transformer, on text, reasoning problems or media; samples and summary."""

import contextlib
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from absl import logging
from rich import box
from rich.console import Console
from rich.table import Table

from megatransformer_jax import streams
from megatransformer_jax.config.generation import GenerationConfig
from megatransformer_jax.config.option import MAX_SEED, ConfigError
from megatransformer_jax.config.run import RunConfig
from megatransformer_jax.config.sampling import DepthConfig, SamplingConfig
from megatransformer_jax.data.batches import Pipeline
from megatransformer_jax.data.media.rows import task_names
from megatransformer_jax.data.pipeline import build_pipeline, validation_batches
from megatransformer_jax.evaluation.answers import answer_samples
from megatransformer_jax.evaluation.depth_table import (
    evaluated_depths,
    make_table,
    score_depths,
    write_depth_table,
)
from megatransformer_jax.evaluation.diagnostics.kinds import DiagnosticsHook, make_subject
from megatransformer_jax.evaluation.media.validation import (
    MediaValidationSet,
    make_media_eval_step,
)
from megatransformer_jax.evaluation.validation import (
    ScoreHook,
    Scores,
    ValidationSet,
    make_eval_step,
    scores_by_name,
)
from megatransformer_jax.generation.generator import Generator
from megatransformer_jax.models.megatransformer import MegaTransformer
from megatransformer_jax.runs.build import (
    MemoryPlan,
    Vocabulary,
    abstract_train_state,
    build_sharded_model,
    build_vocabulary,
    media_formats,
    trained_depth,
)
from megatransformer_jax.runs.task import ParamsOf
from megatransformer_jax.runs.tasks.media_samples import make_media_sampler
from megatransformer_jax.runs.tasks.start import fresh_state
from megatransformer_jax.training.distributed import make_global_batch
from megatransformer_jax.training.loop import Hook, SampleHook, StepFunction
from megatransformer_jax.training.media_hook import MediaSampleHook
from megatransformer_jax.training.micro_batch import CompiledStep
from megatransformer_jax.training.optimizers import build_optimizer
from megatransformer_jax.training.state import TrainState
from megatransformer_jax.training.step import make_train_step
from megatransformer_jax.training.writers import MultiWriter
from megatransformer_jax.types import Batch

# ------------------------------------------------------------------------------
# The run.


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
        self.vocabulary = build_vocabulary(config, workdir)
        self.facts = f"vocabulary: {self.vocabulary.size}"
        self.model, self.sharder = build_sharded_model(config)
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
        return abstract_train_state(
            self.model, self._optimizer, self.sharder, self.config.fine_tuning
        )

    def fresh_state(self) -> TrainState:
        """See `RunKind`."""
        return fresh_state(
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
        depth = trained_depth(self.config)
        if self.config.model.has_media:
            media = self._build_media_validation_set()

            def score(params: Any) -> dict[str, float]:
                return media.score(params, depth).metrics()

        else:
            text, is_reasoning = self.validation_set, self.vocabulary.tokenizer is None

            def score(params: Any) -> dict[str, float]:
                return scores_by_name(text.score(params, depth), is_reasoning=is_reasoning)

        return [ScoreHook(self.config.evaluation.every_steps, score, params_of)]

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
            media=media_formats(self.config),
            **self._processes,
        )

    def _build_validation_set(self) -> ValidationSet:
        batches = validation_batches(
            self.config.data,
            self.vocabulary.tokenizer,
            num_batches=self.config.evaluation.num_batches,
            media=media_formats(self.config),
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
        return jax.random.fold_in(jax.random.key(self.config.train.seed), streams.VALIDATION)


# ------------------------------------------------------------------------------
# What a run shows of its model: continued prompts, or answered problems.

NUM_PROBLEMS = 3


def make_sampler(
    config: RunConfig,
    model: MegaTransformer,
    vocabulary: Vocabulary,
    validation_set: ValidationSet,
) -> Callable[[Any, int], Mapping[str, str]]:
    """A function from (params, step) to texts by name, for all processes of a run to call together.

    Raises:
      ConfigError: if a prompt and its continuation exceed what the model can read.
    """
    own = config.samples.depth
    depth = trained_depth(config) if own is None else own
    tokenizer = vocabulary.tokenizer

    def answer(params: Any, step: int) -> Mapping[str, str]:
        del step  # Answers are not drawn at random.
        texts = answer_samples(
            params,
            validation_set.eval_step,
            validation_set.batches[0],
            (depth,),
            vocabulary.decode,
            count=NUM_PROBLEMS,
        )
        return {f"problem_{index}": text for index, text in enumerate(texts)}

    if tokenizer is None:
        return answer
    # As ids, since a prompt may be empty: then the start token alone is continued.
    prompts = config.samples.prompts
    ids = [[tokenizer.bos_id, *tokenizer.encode(prompt)] for prompt in prompts]
    if config.samples.every_steps:
        _check_lengths(config, ids)

    def continue_prompts(params: Any, step: int) -> Mapping[str, str]:
        generation = _generation(config, step)
        generator = Generator(model, params, tokenizer, generation, trained_depth(config))
        completions = generator.generate(ids)
        return {
            f"prompt_{index}": prompt + completion.text
            for index, (prompt, completion) in enumerate(zip(prompts, completions, strict=True))
        }

    return continue_prompts


def _generation(config: RunConfig, step: int) -> GenerationConfig:
    """The draws differ from step to step."""
    samples = config.samples
    is_greedy = samples.temperature == 0
    return GenerationConfig(
        strategy="greedy" if is_greedy else "sample",
        max_new_tokens=samples.max_new_tokens,
        seed=(config.train.seed + step) % (MAX_SEED + 1),
        depth=DepthConfig(depth=samples.depth),
        sampling=SamplingConfig() if is_greedy else SamplingConfig(temperature=samples.temperature),
    )


def _check_lengths(config: RunConfig, ids: Sequence[Sequence[int]]) -> None:
    """At the start of a run, not at its first sample."""
    samples, max_length = config.samples, config.model.max_length
    longest = max(range(len(ids)), key=lambda index: len(ids[index]))
    room = max_length - len(ids[longest])
    if samples.max_new_tokens > room:
        raise ConfigError(
            "samples.max_new_tokens",
            f"{samples.max_new_tokens} after the {len(ids[longest])} tokens (with the first, bos) "
            f"of {samples.prompts[longest][:40]!r} exceed model.max_length={max_length}; "
            + (f"use at most {room}, or shorten" if room > 0 else "shorten")
            + " samples.prompts, or set samples.every_steps=0.",
        )


# ------------------------------------------------------------------------------
# The end of a run: scores by depth as a table, as JSON and as a plot.

LOG_WIDTH = 100


def summarize(
    config: RunConfig,
    workdir: pathlib.Path,
    params: Any,
    validation_set: ValidationSet,
    vocabulary: Vocabulary,
    console: Console | None,
) -> list[Scores]:
    """Scores the validation set at every depth; the primary process shows and writes it.

    Args:
      config: of the run.
      workdir: gets depth_table.json and depth_table.png; the table is added to its train.log.
      params: the trained parameters.
      validation_set: what is scored.
      vocabulary: to show problems as text.
      console: where the table is printed; None on other processes, which compute only.
    """
    depths = evaluated_depths(config)
    scores = score_depths(params, validation_set, depths)
    is_reasoning = vocabulary.tokenizer is None
    problems: list[str] = []
    if is_reasoning:
        problems = answer_samples(
            params,
            validation_set.eval_step,
            validation_set.batches[0],
            depths,
            vocabulary.decode,
            count=NUM_PROBLEMS,
        )
    if console is None:
        return scores
    for problem in problems:
        console.print(problem, markup=False, highlight=False)
    table = make_table(scores, trained_depth(config), is_reasoning=is_reasoning)
    console.print(table)
    _append(workdir / "train.log", table)
    paths = write_depth_table(workdir, scores, trained_depth(config), is_reasoning=is_reasoning)
    logging.info("table and plot: %s, %s", *paths)
    return scores


def _append(path: pathlib.Path, table: Table) -> None:
    """Adds a table in plain characters; not through the log, because the screen has its own."""
    table.box = box.ASCII
    with open(path, "a", encoding="utf-8") as file:
        Console(file=file, width=LOG_WIDTH).print(table)
