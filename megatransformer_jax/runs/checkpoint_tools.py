"""What is done to checkpoints afterwards: averaged, saved as parameters, pruned, exported."""

import dataclasses
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from absl import logging

from megatransformer_jax.checkpoints.averaging import average_trees
from megatransformer_jax.checkpoints.compatibility import check_model
from megatransformer_jax.checkpoints.folders import (
    FolderTokenizer,
    check_output_folder,
    format_named,
    save_folder,
)
from megatransformer_jax.checkpoints.huginn import Huginn
from megatransformer_jax.checkpoints.manager import CheckpointManager, Ranking
from megatransformer_jax.config.build import build, save_config, to_dict
from megatransformer_jax.config.data import DataConfig, TokenizerConfig
from megatransformer_jax.config.fine_tuning import LoraConfig
from megatransformer_jax.config.loop import BETTER_ENDS, CheckpointConfig
from megatransformer_jax.config.optimizer import OptimizerConfig
from megatransformer_jax.config.option import ConfigError, UserError
from megatransformer_jax.config.run import RunConfig
from megatransformer_jax.config.run_kinds import require_transformer
from megatransformer_jax.data.hf_tokenizer import HuggingFaceTokenizer
from megatransformer_jax.data.media_tokenizer import MediaTokenizer
from megatransformer_jax.data.reasoning.symbol_tokenizer import SymbolTokenizer
from megatransformer_jax.data.tokenizer import (
    BytesTokenizer,
    SentencePieceTokenizer,
    Tokenizer,
)
from megatransformer_jax.runs.load import (
    HUGGINGFACE_FOLDER,
    SENTENCEPIECE_FILE,
    LoadedModel,
    foreign_format,
    load_model,
)
from megatransformer_jax.runs.workdir import hold_workdir
from megatransformer_jax.storage import (
    AnyPath,
    absolute,
    files_below,
    make_and_probe,
    write_atomically,
)

# ------------------------------------------------------------------------------
# The mean of several checkpoints, as a new workdir.

_TOKENIZER_FILES = (SENTENCEPIECE_FILE, "tokenizer.json")


def average_checkpoints(
    source: AnyPath,
    output: AnyPath,
    *,
    last: int | None = None,
    best: int | None = None,
    steps: Sequence[int] | None = None,
    metric: str | None = None,
) -> list[int]:
    """Writes the mean of checkpoints as the only checkpoint of a new workdir.

    Only parameters are kept, under the number of the newest averaged step. One checkpoint is in
    memory at a time, in addition to the sum.

    Args:
      source: the workdir of the run; nothing in it is changed.
      output: the workdir to make; it must not have checkpoints.
      last: averages this many newest checkpoints. One of `last`, `best`, `steps` is given.
      best: this many best ones.
      steps: these.
      metric: what `best` goes by, such as 'validation/accuracy'. None: as the run was configured.

    Returns:
      The steps that were averaged, ascending.

    Raises:
      UserError: if there are too few checkpoints, their architectures differ, a file is missing
        or damaged, or `output` is in use.
    """
    if (foreign := foreign_format(source)) is not None:
        raise UserError(
            f"{source} is a {foreign.title} folder, which has one set of weights; name a run."
        )
    if (output / "checkpoints").exists():
        raise ConfigError("output", f"{output} has checkpoints already; name another folder.")
    checkpoints = CheckpointManager(source / "checkpoints", None)
    try:
        chosen = sorted(_choose(checkpoints, last, best, steps, metric))
        runs = {step: checkpoints.run_info(step) for step in chosen}
    finally:
        checkpoints.close()
    newest = runs[chosen[-1]]
    config = _plain(require_transformer(build(newest["config"])), output)
    for step, run in runs.items():
        check_model(run["config"], config, str(source / "checkpoints" / str(step)))
    params = average_trees(_params(source, step) for step in chosen)

    folder = make_and_probe("output", output)
    for name in _TOKENIZER_FILES:
        if (source / name).is_file():
            write_atomically(folder / name, (source / name).read_bytes())
    if (source / HUGGINGFACE_FOLDER).is_dir():
        for name in files_below(source / HUGGINGFACE_FOLDER):
            content = (source / HUGGINGFACE_FOLDER / name).read_bytes()
            write_atomically(folder / HUGGINGFACE_FOLDER / name, content)
    run = newest | {
        "config": to_dict(config),
        "averaged": {"from": str(absolute(source)), "steps": chosen},
    }
    target = CheckpointManager(folder / "checkpoints", CheckpointConfig())
    try:
        target.save(chosen[-1], {"params": params}, {}, run)
    finally:
        target.close()
    save_config(config, folder / "config.json")
    return chosen


def save_parameters(loaded: LoadedModel, folder: AnyPath) -> None:
    """Writes a model as the folder of a run that holds parameters only.

    Args:
      loaded: the model, with a tokenizer.
      folder: made if absent; it must be empty.

    Raises:
      UserError: if the model has no tokenizer, or the folder cannot be used.
    """
    if loaded.tokenizer is None:
        raise UserError(
            f"{loaded.description} has no tokenizer, which the folder of a run needs; save it with "
            "another format, or create it with one."
        )
    if folder.is_dir() and any(folder.iterdir()):
        raise ConfigError(
            "folder", f"{folder} is not empty; name another folder, or delete it first."
        )
    config = _plain(describing_run(loaded), folder)
    folder = make_and_probe("folder", folder)
    digest = write_tokenizer(loaded.tokenizer, folder)
    run = {
        "config": to_dict(config),
        "vocabulary": digest,
        "averaged": {"from": loaded.description, "steps": [0]},
    }
    target = CheckpointManager(folder / "checkpoints", CheckpointConfig())
    try:
        target.save(0, {"params": loaded.params}, {}, run)
    finally:
        target.close()
    save_config(config, folder / "config.json")


def describing_run(loaded: LoadedModel) -> RunConfig:
    """The run that a model belongs to, or one that describes it."""
    if loaded.run_config is not None:
        return dataclasses.replace(loaded.run_config, model=loaded.config)
    kind = "bytes" if isinstance(loaded.tokenizer, BytesTokenizer) else "sentencepiece"
    length = min(DataConfig().sequence_length, loaded.config.max_length)
    data = DataConfig(tokenizer=TokenizerConfig(kind=kind), sequence_length=length)
    return RunConfig(model=loaded.config, data=data)


def write_tokenizer(tokenizer: Tokenizer, folder: AnyPath) -> str:
    """Puts the tokenizer where `load_model` looks for it; returns what identifies it."""
    if isinstance(tokenizer, MediaTokenizer):
        write_tokenizer(tokenizer.base, folder)
        return tokenizer.digest()
    if isinstance(tokenizer, SentencePieceTokenizer):
        write_atomically(folder / SENTENCEPIECE_FILE, tokenizer.model)
    elif isinstance(tokenizer, HuggingFaceTokenizer):
        tokenizer.save(folder / HUGGINGFACE_FOLDER)
    elif not isinstance(tokenizer, (BytesTokenizer, SymbolTokenizer)):
        raise UserError(
            f"a {type(tokenizer).__name__} cannot be written; use one of ours, such as "
            "SentencePieceTokenizer."
        )
    return tokenizer.digest()


def _params(source: AnyPath, step: int) -> dict:
    loaded = load_model(source, step=step)
    logging.info("adding %s", loaded.description)
    return loaded.params


def _choose(
    checkpoints: CheckpointManager,
    last: int | None,
    best: int | None,
    steps: Sequence[int] | None,
    metric: str | None,
) -> list[int]:
    there = checkpoints.steps()
    if not there:
        raise UserError(f"{checkpoints.directory} has no complete checkpoint; train first.")
    if metric is not None and best is None:
        raise ConfigError("metric", f"{metric!r} would be ignored: only best goes by a metric.")
    if steps is not None:
        return _named(checkpoints, steps)
    if best is not None:
        ranking = checkpoints.ranking() if metric is None else _ranking(metric)
        found = checkpoints.best_steps(ranking, max(best, 0))
        what, count, name = f"a finite {ranking.metric}", best, "best"
    else:
        assert last is not None, "one of last, best, steps is given"
        found = there[-last:] if last > 0 else []
        what, count, name = "been kept", last, "last"
    if count < 1:
        raise ConfigError(name, f"{count} is too few; give at least 1.")
    if len(found) < count:
        raise ConfigError(
            name,
            f"{count}, but only {len(found)} checkpoints of {checkpoints.directory} have {what} "
            f"(there are {_listed(there)}). Give a smaller number; a run keeps more with "
            "checkpoint.keep_last or checkpoint.keep_best.",
        )
    return found


def _ranking(metric: str) -> Ranking:
    try:
        return Ranking.from_config(CheckpointConfig(best_metric=metric))
    except ConfigError as error:
        raise ConfigError(
            "metric", f"{metric!r} is not known; known: {', '.join(BETTER_ENDS)}."
        ) from error


def _named(checkpoints: CheckpointManager, steps: Sequence[int]) -> list[int]:
    absent = [step for step in steps if step not in checkpoints.steps()]
    if absent or len(set(steps)) < len(steps):
        problem = f"has no step {_listed(absent)}" if absent else "has each step once only"
        raise ConfigError(
            "steps",
            f"{_listed(steps)}: {checkpoints.directory} {problem}; there are "
            f"{_listed(checkpoints.steps())}.",
        )
    return list(steps)


def _listed(steps: Sequence[int]) -> str:
    return ", ".join(map(str, steps))


def _plain(config: RunConfig, workdir: AnyPath) -> RunConfig:
    """The run's configuration for a checkpoint of a model's parameters and nothing else.

    The mean is of what the run evaluates: averages are in it, and LoRA's updates are added.
    """
    optimizer = config.optimizer
    if optimizer.is_schedule_free:
        optimizer = OptimizerConfig(warmup_steps=0)
    return dataclasses.replace(
        config,
        workdir=str(workdir),
        optimizer=optimizer,
        train=dataclasses.replace(config.train, ema_decay=None),
        fine_tuning=dataclasses.replace(
            config.fine_tuning, lora=LoraConfig(), base_precision="float32"
        ),
    )


# ------------------------------------------------------------------------------
# Rules of retention, applied to a workdir that exists.


@dataclasses.dataclass(frozen=True)
class Pruned:
    """What pruning did or would do.

    Attributes:
      deleted: bytes on disk by step.
      kept: the steps that stay, ascending.
    """

    deleted: dict[int, int]
    kept: list[int]


def prune_checkpoints(workdir: AnyPath, rules: Mapping[str, Any], *, is_dry_run: bool) -> Pruned:
    """Deletes the checkpoints of a run that no rule keeps.

    Args:
      workdir: of the run.
      rules: options of `CheckpointConfig` in place of those of the run.
      is_dry_run: changes nothing; the run may go on.

    Raises:
      UserError: if there is no checkpoint, a rule has a value that is not allowed, or a run is
        writing to the workdir.
    """
    folder = workdir / "checkpoints"
    reader = CheckpointManager(folder, None)
    try:
        steps = reader.steps()
        if not steps:
            raise UserError(f"{folder} has no complete checkpoint; there is nothing to prune.")
        config = build(reader.run_info(steps[-1])["config"])
        checkpoint = dataclasses.replace(config.checkpoint, **rules)
        ranking = Ranking.from_config(checkpoint)
        if "best_metric" in rules and not reader.best_steps(ranking, 1):
            raise ConfigError(
                "best_metric",
                f"no checkpoint of {folder} has a finite {ranking.metric}; name another, or leave "
                "it out.",
            )
        planned = reader.prune(checkpoint, is_dry_run=True)
    finally:
        reader.close()
    kept = [step for step in steps if step not in planned]
    if is_dry_run:
        return Pruned(planned, kept)
    with hold_workdir(workdir):
        # Opened only now: it also removes what a killed run left half written.
        manager = CheckpointManager(folder, checkpoint)
        try:
            return Pruned(manager.prune(checkpoint), manager.steps())
        finally:
            manager.close()


# ------------------------------------------------------------------------------
# A checkpoint as a folder of another project's format.

_UNITS = {
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "KiB": 2**10,
    "MiB": 2**20,
    "GiB": 2**30,
}


def export_model(
    loaded: LoadedModel,
    output: pathlib.Path,
    *,
    format: str = "huginn",
    max_shard: str = "5GiB",
    dtype: str | None = None,
    with_rotary_table: bool = True,
    overwrite: bool = False,
) -> None:
    """Writes a model in another project's format: config.json, safetensors, tokenizer.

    Args:
      loaded: the model.
      output: the folder, made if absent.
      format: name of the format, one of `FOREIGN_FORMATS`.
      max_shard: size of a file of weights at most, such as '5GiB'.
      dtype: stores the weights as this, which rounds them. None: float32, as they are.
      with_rotary_table: of format 'huginn', also stores freqs_cis, which its model class wants.
      overwrite: replaces an older export in the same folder.

    Raises:
      UserError: if the format cannot express the model, or the folder cannot be used.
    """
    if loaded.quantization is not None:
        raise UserError(
            f"{loaded.description} is quantised, and other formats have float weights; export "
            f"{loaded.quantized_from}."
        )
    max_shard_bytes = check_export(output, max_shard=max_shard, overwrite=overwrite)
    try:
        save_folder(
            output,
            Huginn(with_rotary_table) if format == Huginn.name else format_named(format),
            loaded.config,
            loaded.params,
            max_shard_bytes=max_shard_bytes,
            dtype=dtype,
            overwrite=overwrite,
            tokenizer=_folder_tokenizer(loaded.tokenizer),
        )
    except OSError as error:
        raise ConfigError(
            "output",
            f"{output} cannot be written ({error.strerror or error}); make room, or choose another "
            "folder.",
        ) from error


def check_export(output: pathlib.Path, *, max_shard: str, overwrite: bool) -> int:
    """Checks before a model is loaded that it can be written there; returns `max_shard` in bytes.

    Raises:
      UserError: if it cannot.
    """
    size = parse_size(max_shard)
    check_output_folder(output.absolute(), overwrite=overwrite)
    return size


def parse_size(text: str) -> int:
    """Bytes of a size such as '5GiB' or '500MB'.

    Raises:
      UserError: if it is none.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]+)", text)
    size = int(float(match[1]) * _UNITS[match[2]]) if match and match[2] in _UNITS else 0
    if size < 1:
        raise ConfigError(
            "max_shard",
            f"{text!r} is not a size; give a number above 0 and a unit, such as 5GiB; the units "
            f"are {', '.join(_UNITS)}.",
        )
    return size


def _folder_tokenizer(tokenizer: Tokenizer | None) -> FolderTokenizer:
    """What a folder keeps of the tokenizer, as far as it has a file."""
    special_ids: dict[str, Any] = {}
    files: dict[str, bytes] = {}
    if tokenizer is not None and not isinstance(tokenizer, SymbolTokenizer):
        special_ids = {
            "bos_token_id": tokenizer.bos_id,
            "eos_token_id": tokenizer.eos_id,
            "pad_token_id": tokenizer.pad_id,
        }
    if isinstance(tokenizer, SentencePieceTokenizer):
        files[SENTENCEPIECE_FILE] = tokenizer.model
    elif isinstance(tokenizer, HuggingFaceTokenizer):
        special_ids["eos_token_id"] = list(tokenizer.end_ids)
        files |= {name: text.encode() for name, text in tokenizer.files().items()}
    elif tokenizer is not None:
        logging.warning(
            "the run's %s has no file, so no tokenizer is exported: prompts for the exported "
            "model must be token ids.",
            type(tokenizer).__name__,
        )
    return FolderTokenizer(special_ids, files)
