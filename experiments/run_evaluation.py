"""One command of `experiments.evaluate`: loads the model, scores it at each depth, writes files."""

import pathlib
from collections.abc import Sequence

import jax
from absl import logging
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from experiments.evaluate_flags import (
    MEDIA_OPTIONS,
    SOUND_OPTIONS,
    Command,
    EvaluateOptions,
    as_written,
)
from experiments.evaluation_data import evaluation_batches, is_reasoning, read_run_config
from experiments.load_model import LoadedModel, is_huginn_folder
from experiments.media_measures import reject_options
from experiments.model_choice import load_chosen_model
from experiments.out_of_memory import out_of_memory_is_bad_input
from experiments.reference_file import read_predictions, read_references
from experiments.run_media_evaluation import evaluate_media
from experiments.run_text_evaluation import evaluate_generation
from experiments.workdir import make_folder
from megatransformer_jax.config.option import ConfigError
from megatransformer_jax.config.run import RunConfig
from megatransformer_jax.evaluation.depth_table import make_table, write_depth_table
from megatransformer_jax.evaluation.text_metrics import (
    TextScores,
    make_text_table,
    predicted_text_size,
    score_texts,
    write_text_scores,
)
from megatransformer_jax.evaluation.validation import (
    Scores,
    depth_argument,
    make_eval_step,
    mean_scores,
)
from megatransformer_jax.types import Batch


def run(command: Command) -> None:
    """Does what the command asks for.

    Raises:
      UserError: if an option does not fit the model, or a file or folder cannot be used.
    """
    try:
        if command.options.predictions is not None:
            paths = _score_predictions(command.options)
        else:
            paths = _evaluate_model(command)
    except ConfigError as error:
        raise as_written(error) from None
    for path in paths:
        logging.info("written: %s", path)


def _score_predictions(options: EvaluateOptions) -> Sequence[pathlib.Path]:
    assert options.references is not None and options.predictions is not None
    references = read_references(options.references, needs_prompts=False)
    texts = read_predictions(options.predictions, count=len(references))
    scores: dict[int | None, TextScores] = {
        None: score_texts(texts, [reference.texts for reference in references])
    }
    Console().print(make_text_table(scores, None))
    if options.output is None:
        return []
    return write_text_scores(make_folder("output", options.output), scores, None)


def _evaluate_model(command: Command) -> Sequence[pathlib.Path]:
    options = command.options
    folder = pathlib.Path(options.model or "").expanduser()
    if options.references is not None:
        # Bad input is known before the model is loaded.
        read_references(options.references, needs_prompts=True)
    loaded = load_chosen_model(folder, options)
    run_config = None if is_huginn_folder(folder) else read_run_config(folder)
    depths = _depths(options, loaded, run_config)
    output = make_folder("output", options.output or str(folder / "evaluation"))
    with out_of_memory_is_bad_input():
        if options.references is not None:
            return evaluate_generation(command, loaded, depths, output, _progress())
        return _score_data(options, loaded, run_config, depths, output)


def _depths(
    options: EvaluateOptions, loaded: LoadedModel, run_config: RunConfig | None
) -> tuple[int | None, ...]:
    mean = loaded.trained_depth
    if mean is None:
        if options.depths:
            raise ConfigError("depths", "this model has no recurrent core; leave it out.")
        return (None,)
    if options.depths:
        return options.depths
    if run_config is not None:
        return run_config.evaluation.final_depths
    return tuple(sorted({max(mean // 4, 1), max(mean // 2, 1), mean, 2 * mean}))


def _score_data(
    options: EvaluateOptions,
    loaded: LoadedModel,
    run_config: RunConfig | None,
    depths: Sequence[int | None],
    output: pathlib.Path,
) -> Sequence[pathlib.Path]:
    scores_media = run_config is not None and run_config.data.source == "media" and not options.data
    if not scores_media:
        names = (*MEDIA_OPTIONS, *SOUND_OPTIONS)
        reject_options(options, names, "no media are made where text alone is scored")
    batches = evaluation_batches(options, loaded, run_config)
    state_key = _state_key(options, run_config)
    if scores_media:
        assert run_config is not None  # `scores_media` says so.
        return evaluate_media(
            options, loaded, run_config, batches, depths, state_key, output, _progress()
        )
    reasoning = is_reasoning(run_config)
    size = None
    if not reasoning and loaded.tokenizer is not None:
        size = predicted_text_size(batches, loaded.tokenizer)
    scores = score_batches(loaded, batches, depths, state_key, _progress())
    mean = loaded.trained_depth
    Console().print(make_table(scores, mean, is_reasoning=reasoning, text_size=size))
    return write_depth_table(output, scores, mean, is_reasoning=reasoning, text_size=size)


def score_batches(
    loaded: LoadedModel,
    batches: Sequence[Batch],
    depths: Sequence[int | None],
    key: jax.Array,
    progress: Progress,
) -> list[Scores]:
    """Scores batches at each depth, with one compilation for all.

    Args:
      loaded: the model.
      batches: on the host.
      depths: iterations of the core; None: the model has none.
      key: of the core's first states.
      progress: shows how far it is.
    """
    eval_step = jax.jit(make_eval_step(loaded.model, key))
    scores = []
    with progress:
        task = progress.add_task("scoring", total=len(batches) * len(depths))
        for depth in depths:
            sums = []
            for batch in batches:
                on_device = jax.device_put(batch, jax.local_devices()[0])
                step = eval_step(loaded.params, on_device, depth_argument(depth))
                sums.append(jax.device_get(step[0]))
                progress.advance(task)
            scores.append(mean_scores(depth, sums))
    return scores


def _state_key(options: EvaluateOptions, run_config: RunConfig | None) -> jax.Array:
    if options.seed is not None:
        return jax.random.key(options.seed)
    if run_config is None:
        return jax.random.key(0)
    # As validation in training has it.
    return jax.random.fold_in(jax.random.key(run_config.train.seed), 2**32 - 1)


def _progress() -> Progress:
    """A bar on stderr; nothing where that is a file."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    return Progress(
        *columns,
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
