"""Scores a finished model at several depths: held-out data of its run, or text in files.

Texts that the model generates are scored by `evaluate_text.py`, images and sound by
`evaluate_media.py`; `evaluate` chooses.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Sequence

import jax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from megatransformer_jax import streams
from megatransformer_jax.config.data import DataConfig
from megatransformer_jax.config.generation import GenerationConfig
from megatransformer_jax.config.option import ConfigError, UserError
from megatransformer_jax.config.run import RunConfig
from megatransformer_jax.config.run_rules import media_places
from megatransformer_jax.config.sampling import DepthConfig
from megatransformer_jax.config.scoring import FILE_KINDS, ScoringConfig
from megatransformer_jax.data.media.records import MediaFormats
from megatransformer_jax.data.pipeline import validation_batches
from megatransformer_jax.evaluation.depth_table import (
    depth_rows,
    make_table,
    plot_scores,
    write_depth_table,
)
from megatransformer_jax.evaluation.report import Report
from megatransformer_jax.evaluation.text_metrics import TextSize, predicted_text_size
from megatransformer_jax.evaluation.validation import (
    PROBLEM_SCORES,
    TEXT_SCORES,
    Scores,
    depth_argument,
    make_eval_step,
    mean_scores,
)
from megatransformer_jax.models.gate_readout import GateReadout, make_readout
from megatransformer_jax.runs.evaluate_media import evaluate_media
from megatransformer_jax.runs.evaluate_text import evaluate_generation, read_references
from megatransformer_jax.runs.load import LoadedModel
from megatransformer_jax.types import Batch

# Where no run says.
DEFAULT_BATCH_SIZE = 8
DEFAULT_LENGTH = 1024


def evaluate(
    loaded: LoadedModel,
    options: ScoringConfig,
    generation: GenerationConfig,
    *,
    progress: Progress | None = None,
) -> Report:
    """Scores a model at each depth.

    Args:
      loaded: the model.
      options: on what it is scored, and how.
      generation: how prompts are continued; read only with `options.references`.
      progress: shows how far it is. None: a bar on stderr, if that is a terminal.

    Raises:
      UserError: if an option does not fit the model, or data cannot be read.
    """
    if options.references is not None:
        # Bad input is known before the model runs.
        read_references(options.references, needs_prompts=True)
    progress = progress or make_progress()
    depths = evaluation_depths(options, loaded)
    if options.references is not None:
        return evaluate_generation(
            loaded,
            options,
            generation,
            depths,
            batch_size=options.batch_size or DEFAULT_BATCH_SIZE,
            progress=progress,
        )
    reading = DepthConfig(gate_readout=options.gate_readout, gate_threshold=options.gate_threshold)
    reading.check_gate(loaded.config.exit_gate.enabled)
    key = state_key(options, loaded.run_config)
    check_votes(options, loaded)
    shown: Sequence[str] = TEXT_SCORES
    tokenizer = loaded.tokenizer
    match "text" if options.files else loaded.task:
        case "media":
            if options.gate_readout != "last":
                raise ConfigError(
                    "gate_readout",
                    f"{options.gate_readout!r} is for text and problems, and this model is scored "
                    "on media; leave it out.",
                )
            batches = evaluation_batches(options, loaded)
            return evaluate_media(loaded, options, batches, depths, key, progress)
        case "reasoning":
            shown, tokenizer = PROBLEM_SCORES, None
    options.reject_media("no media are made where text alone is scored")
    batches = evaluation_batches(options, loaded)
    size = None if tokenizer is None else predicted_text_size(batches, tokenizer)
    readout = make_readout(reading.gate_readout, reading.gate_threshold)
    scores = score_batches(
        loaded, batches, depths, key, progress, readout=readout, votes=options.votes
    )
    return _report(scores, loaded.trained_depth, shown, size, options.votes)


def check_votes(options: ScoringConfig, loaded: LoadedModel) -> None:
    """Checks that several passes over a problem differ.

    Raises:
      ConfigError: naming the option.
    """
    if options.votes == 1:
        return
    config = loaded.config
    if options.files or loaded.task != "reasoning":
        problem = "is for answers to problems, and this scores text or media; leave it out."
    elif not config.is_recurrent:
        problem = "needs a recurrent core, whose first state is drawn; leave it out."
    elif config.recurrence.state_init in ("zero", "none"):
        problem = (
            "needs first states that differ, and this model's are not drawn "
            f"(model.recurrence.state_init={config.recurrence.state_init!r}); leave it out."
        )
    else:
        return
    raise ConfigError("votes", f"{options.votes} {problem}")


def evaluation_depths(options: ScoringConfig, loaded: LoadedModel) -> tuple[int | None, ...]:
    """The depths that are scored.

    Raises:
      ConfigError: if depths are given for a model without a core.
    """
    mean = loaded.trained_depth
    if mean is None:
        if options.depths:
            raise ConfigError("depths", "this model has no recurrent core; leave it out.")
        return (None,)
    if options.depths:
        return options.depths
    if loaded.run_config is not None:
        return loaded.run_config.evaluation.final_depths
    return tuple(sorted({max(mean // 4, 1), max(mean // 2, 1), mean, 2 * mean}))


def _report(
    scores: Sequence[Scores],
    mean: int | None,
    names: Sequence[str],
    size: TextSize | None,
    votes: int,
) -> Report:
    table = make_table(scores, mean, names, text_size=size)
    if votes > 1:
        table.title = f"{table.title}, {votes} votes"
    return Report(
        depth_rows(scores, size),
        [table],
        functools.partial(
            write_depth_table,
            scores=scores,
            trained_depth=mean,
            names=names,
            text_size=size,
            votes=votes,
        ),
        functools.partial(plot_scores, scores, mean, names[-1]),
    )


def score_batches(
    loaded: LoadedModel,
    batches: Sequence[Batch],
    depths: Sequence[int | None],
    key: jax.Array,
    progress: Progress,
    *,
    readout: GateReadout | None = None,
    votes: int = 1,
) -> list[Scores]:
    """Scores batches at each depth, with one compilation for all.

    Args:
      loaded: the model.
      batches: on the host.
      depths: iterations of the core; None: the model has none.
      key: of the core's first states.
      progress: shows how far it is.
      readout: what is scored of the iterations. None: the last one's output.
      votes: first states that vote, see `make_eval_step`.
    """
    eval_step = jax.jit(make_eval_step(loaded.model, key, readout, votes=votes))
    scores = []
    with progress:
        task = progress.add_task("scoring", total=len(batches) * len(depths))
        for depth in depths:
            sums = []
            for batch in batches:
                on_device = jax.device_put(batch, jax.local_devices()[0])
                step = eval_step(loaded.weights, on_device, depth_argument(depth))
                sums.append(jax.device_get(step[0]))
                progress.advance(task)
            scores.append(mean_scores(depth, sums))
    return scores


def state_key(options: ScoringConfig, run: RunConfig | None) -> jax.Array:
    """The key of the core's first states: that of the options, else that of validation."""
    if options.seed is not None:
        return jax.random.key(options.seed)
    if run is None:
        return jax.random.key(0)
    # As validation in training has it.
    return jax.random.fold_in(jax.random.key(run.train.seed), streams.VALIDATION)


def make_progress() -> Progress:
    """A bar on stderr; nothing where that is a file."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    return Progress(
        *columns,
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not (console.is_terminal or console.is_jupyter),
    )


# ------------------------------------------------------------------------------
# The batches that are scored: a run's validation split, or files.


def evaluation_batches(options: ScoringConfig, loaded: LoadedModel) -> list[Batch]:
    """What is scored.

    Raises:
      UserError: if there is nothing to score, or the data cannot be read.
    """
    run = loaded.run_config
    config = _data_config(options, loaded)
    # Of a run's own data; files have no media.
    places = 0 if run is None or options.files else sum(media_places(run))
    limit = loaded.config.max_length - places
    reason = f" less the {places} places of a row's media" if places else ""
    if config.sequence_length > limit:
        raise ConfigError(
            "sequence_length",
            f"{config.sequence_length} exceeds the model's max_length={loaded.config.max_length}"
            f"{reason}; set it to {limit} or less.",
        )
    try:
        batches = validation_batches(
            config,
            loaded.tokenizer,
            num_batches=options.num_batches,
            media=MediaFormats.of_model(loaded.config),
        )
    except ConfigError as error:
        if error.path in ("data.files", "data.validation_files") and options.files:
            raise ConfigError("files", error.problem) from error
        raise
    if not batches:
        raise UserError(f"{', '.join(options.files) or 'the validation split'} holds no text.")
    return batches


def _data_config(options: ScoringConfig, loaded: LoadedModel) -> DataConfig:
    run = loaded.run_config
    if run is None:
        batch_size, length = DEFAULT_BATCH_SIZE, min(DEFAULT_LENGTH, loaded.config.max_length)
    else:
        batch_size, length = run.data.batch_size, run.data.sequence_length
    batch_size, length = options.batch_size or batch_size, options.sequence_length or length
    if not options.files:
        if run is None:
            raise ConfigError(
                "files",
                f"is missing; {loaded.description} has no validation data, so name files with "
                "text (.txt, .jsonl, .parquet), or references.",
            )
        return dataclasses.replace(run.data, batch_size=batch_size, sequence_length=length)
    if loaded.task == "reasoning":
        raise ConfigError(
            "files",
            "are not for a model that reads symbols of a reasoning task, not text; leave them out "
            "to score its own held-out problems.",
        )
    if loaded.tokenizer is None:
        raise ConfigError(
            "files",
            f"are not for {loaded.description}, which has no tokenizer, so it reads no text.",
        )
    return DataConfig(
        source=FILE_KINDS[pathlib.PurePath(options.files[0]).suffix],
        files=options.files,
        validation_files=options.files,
        text_field=options.text_field,
        batch_size=batch_size,
        sequence_length=length,
        packing="pack" if run is None else run.data.packing,
    )
