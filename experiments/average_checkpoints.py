"""Makes a workdir that holds the mean of several checkpoints of a run."""

import dataclasses
import pathlib
import shutil

from absl import logging

from experiments.load_model import (
    HUGGINGFACE_FOLDER,
    SENTENCEPIECE_FILE,
    is_huginn_folder,
    load_model,
)
from experiments.workdir import make_folder
from megatransformer_jax.checkpoints.averaging import average_trees
from megatransformer_jax.checkpoints.compatibility import check_model
from megatransformer_jax.checkpoints.manager import CheckpointManager, Ranking
from megatransformer_jax.config.build import build, save_config, to_dict
from megatransformer_jax.config.fine_tuning import LoraConfig
from megatransformer_jax.config.loop import BETTER_ENDS, CheckpointConfig
from megatransformer_jax.config.optimizer import OptimizerConfig
from megatransformer_jax.config.option import ConfigError, UserError
from megatransformer_jax.config.run import RunConfig

_TOKENIZER_FILES = (SENTENCEPIECE_FILE, "tokenizer.json")


def average_checkpoints(
    source: pathlib.Path,
    out: pathlib.Path,
    *,
    last: int | None = None,
    best: int | None = None,
    steps: str | None = None,
    metric: str | None = None,
) -> list[int]:
    """Writes the mean of checkpoints as the only checkpoint of a new workdir.

    Only parameters are kept, under the number of the newest averaged step. One checkpoint is in
    memory at a time, beside the sum.

    Args:
      source: the workdir of the run; nothing in it is changed.
      out: the workdir to make; it must not have checkpoints.
      last: averages this many newest checkpoints. One of `last`, `best`, `steps` is given.
      best: this many best ones.
      steps: these, with commas between.
      metric: what `best` goes by, such as 'validation/accuracy'. None: as the run was configured.

    Returns:
      The steps that were averaged, ascending.

    Raises:
      UserError: if there are too few checkpoints, their architectures differ, a file is missing
        or damaged, or `out` is in use.
    """
    source = source.expanduser()
    if is_huginn_folder(source):
        raise UserError(f"{source} is a Huginn folder, which has one set of weights; name a run.")
    if (out.expanduser() / "checkpoints").exists():
        raise UserError(f"{out} has checkpoints already; name another folder with --out.")
    checkpoints = CheckpointManager(source / "checkpoints", None)
    try:
        chosen = sorted(_choose(checkpoints, last, best, steps, metric))
        runs = {step: checkpoints.run_info(step) for step in chosen}
    finally:
        checkpoints.close()
    newest = runs[chosen[-1]]
    config = _plain(build(newest["config"]), out)
    for step, run in runs.items():
        check_model(run["config"], config, str(source / "checkpoints" / str(step)))
    params = average_trees(_params(source, step) for step in chosen)

    folder = make_folder("--out", str(out))
    for name in _TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    if (source / HUGGINGFACE_FOLDER).is_dir():
        shutil.copytree(
            source / HUGGINGFACE_FOLDER, folder / HUGGINGFACE_FOLDER, dirs_exist_ok=True
        )
    run = newest | {
        "config": to_dict(config),
        "averaged": {"from": str(source.absolute()), "steps": chosen},
    }
    target = CheckpointManager(folder / "checkpoints", CheckpointConfig())
    try:
        target.save(chosen[-1], {"params": params}, {}, run)
    finally:
        target.close()
    save_config(config, folder / "config.json")
    return chosen


def _params(source: pathlib.Path, step: int) -> dict:
    loaded = load_model(source, step=step)
    logging.info("adding %s", loaded.description)
    return loaded.params


def _choose(
    checkpoints: CheckpointManager,
    last: int | None,
    best: int | None,
    steps: str | None,
    metric: str | None,
) -> list[int]:
    there = checkpoints.steps()
    if not there:
        raise UserError(f"{checkpoints.directory} has no complete checkpoint; train first.")
    if metric is not None and best is None:
        raise UserError(f"--metric={metric} would be ignored: only --best goes by a metric.")
    if steps is not None:
        return _named(checkpoints, steps)
    if best is not None:
        ranking = checkpoints.ranking() if metric is None else _ranking(metric)
        found = checkpoints.best_steps(ranking, max(best, 0))
        what, count, name = f"a finite {ranking.metric}", best, "--best"
    else:
        assert last is not None, "one of last, best, steps is given"
        found = there[-last:] if last > 0 else []
        what, count, name = "been kept", last, "--last"
    if count < 1:
        raise UserError(f"{name}={count}: give at least 1.")
    if len(found) < count:
        raise UserError(
            f"{name}={count}: only {len(found)} checkpoints of {checkpoints.directory} have {what} "
            f"(there are {_listed(there)}). Give a smaller number; a run keeps more with "
            "checkpoint.keep_last or checkpoint.keep_best."
        )
    return found


def _ranking(metric: str) -> Ranking:
    try:
        return Ranking.from_config(CheckpointConfig(best_metric=metric))
    except ConfigError as error:
        raise UserError(
            f"--metric={metric} is not known; known: {', '.join(BETTER_ENDS)}."
        ) from error


def _named(checkpoints: CheckpointManager, text: str) -> list[int]:
    words = text.split(",")
    if not all(word.isdecimal() for word in words):
        raise UserError(f"--steps={text}: give numbers with commas between, such as 100,200.")
    steps = [int(word) for word in words]
    absent = [step for step in steps if step not in checkpoints.steps()]
    if absent or len(set(steps)) < len(steps):
        problem = f"has no step {_listed(absent)}" if absent else "has each step once only"
        raise UserError(
            f"--steps={text}: {checkpoints.directory} {problem}; there are "
            f"{_listed(checkpoints.steps())}."
        )
    return steps


def _listed(steps: list[int]) -> str:
    return ", ".join(map(str, steps))


def _plain(config: RunConfig, out: pathlib.Path) -> RunConfig:
    """The run's configuration for a checkpoint of a model's parameters and nothing else.

    The mean is of what the run evaluates: averages are in it, and LoRA's updates are added.
    """
    optimizer = config.optimizer
    if optimizer.is_schedule_free:
        optimizer = OptimizerConfig(warmup_steps=0)
    return dataclasses.replace(
        config,
        workdir=str(out),
        optimizer=optimizer,
        train=dataclasses.replace(config.train, ema_decay=None),
        fine_tuning=dataclasses.replace(
            config.fine_tuning, lora=LoraConfig(), base_precision="float32"
        ),
    )
