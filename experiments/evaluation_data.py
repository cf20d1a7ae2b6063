"""The batches that `experiments.evaluate` scores: a run's validation split, or files."""

import dataclasses
import pathlib

from experiments.evaluate_flags import FILE_KINDS, EvaluateOptions
from experiments.load_model import LoadedModel
from megatransformer_jax.config.build import build, read_values
from megatransformer_jax.config.data import DataConfig
from megatransformer_jax.config.option import ConfigError, UserError
from megatransformer_jax.config.run import RunConfig
from megatransformer_jax.config.run_rules import media_places
from megatransformer_jax.data.media.records import MediaFormats
from megatransformer_jax.data.pipeline import validation_batches
from megatransformer_jax.types import Batch

# Where no run says.
DEFAULT_BATCH_SIZE = 8
DEFAULT_LENGTH = 1024


def read_run_config(folder: pathlib.Path) -> RunConfig:
    """The configuration in a workdir.

    Raises:
      UserError: if there is none, or it is of another version of the library.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(f"{path} does not exist; it says what data the run is validated on.")
    try:
        return build(read_values(path))
    except ConfigError as error:
        raise UserError(
            f"{path} does not fit this version of the library ({error}); use the version that "
            "wrote it."
        ) from error


def evaluation_batches(
    options: EvaluateOptions, loaded: LoadedModel, run: RunConfig | None
) -> list[Batch]:
    """What the command scores.

    Args:
      options: of the command.
      loaded: the model.
      run: its configuration; None: it is a Huginn folder.

    Raises:
      UserError: if there is nothing to score, or the data cannot be read.
    """
    config = _data_config(options, loaded, run)
    limit, reason = loaded.config.max_length, ""
    if run is not None and config.source == "media":
        places = sum(media_places(run))
        limit, reason = limit - places, f" less the {places} places of a row's media"
    if config.sequence_length > limit:
        raise ConfigError(
            "sequence_length",
            f"{config.sequence_length} exceeds the model's max_length={loaded.config.max_length}"
            f"{reason}; set it to {limit} or less.",
        )
    tokenizer = None if config.source == "reasoning" else loaded.tokenizer
    try:
        batches = validation_batches(
            config,
            tokenizer,
            num_batches=options.num_batches,
            media=MediaFormats.of_model(loaded.config),
        )
    except ConfigError as error:
        if error.path in ("data.files", "data.validation_files") and options.data:
            raise ConfigError("data", error.problem) from error
        raise
    if not batches:
        raise UserError(f"{', '.join(options.data) or 'the validation split'} holds no text.")
    return batches


def is_reasoning(run: RunConfig | None) -> bool:
    """Whether the model was trained on problems, whose answers are right or wrong."""
    return run is not None and run.data.source == "reasoning"


def _data_config(
    options: EvaluateOptions, loaded: LoadedModel, run: RunConfig | None
) -> DataConfig:
    if run is None:
        batch_size, length = DEFAULT_BATCH_SIZE, min(DEFAULT_LENGTH, loaded.config.max_length)
    else:
        batch_size, length = run.data.batch_size, run.data.sequence_length
    batch_size, length = options.batch_size or batch_size, options.sequence_length or length
    if not options.data:
        if run is None:
            raise UserError(
                "--data: is missing; a Huginn folder has no validation data, so name files with "
                "text (.txt, .jsonl, .parquet), or give --references."
            )
        return dataclasses.replace(run.data, batch_size=batch_size, sequence_length=length)
    if is_reasoning(run):
        raise UserError(
            "--data: the model reads symbols of a reasoning task, not text; leave --data out to "
            "score its own held-out problems."
        )
    if loaded.tokenizer is None:
        raise UserError(f"--data: {loaded.description} has no tokenizer, so it reads no text.")
    return DataConfig(
        source=FILE_KINDS[pathlib.PurePath(options.data[0]).suffix],
        files=options.data,
        validation_files=options.data,
        text_field=options.text_field,
        batch_size=batch_size,
        sequence_length=length,
        packing="pack" if run is None else run.data.packing,
    )
