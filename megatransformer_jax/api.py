"""The public face: models, training and evaluation in a few lines of Python.

Everything here is reached as `import megatransformer_jax as mt; mt.load(...)`. Options have the
names of the configuration and of the command line; one that is not known is an error that names the
nearest.
"""

import contextlib
import dataclasses
import os
import pathlib
import typing
import weakref
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from megatransformer_jax.config.build import (
    build,
    check_values,
    construct,
    load_preset,
    merge,
    plain,
)
from megatransformer_jax.config.build import configure as resolve
from megatransformer_jax.config.generation import GenerationConfig
from megatransformer_jax.config.model import ModelConfig
from megatransformer_jax.config.option import (
    ConfigError,
    UserError,
    as_tuple,
    declared_values,
    options_of,
)
from megatransformer_jax.config.run import RunConfig
from megatransformer_jax.config.scoring import OF_GENERATION, ScoringConfig, check_generation
from megatransformer_jax.data.media.encoding import check_media
from megatransformer_jax.data.tokenizer import Tokenizer
from megatransformer_jax.evaluation.report import Report
from megatransformer_jax.generation.request import out_of_memory_is_bad_input
from megatransformer_jax.model import Model
from megatransformer_jax.models.megatransformer import build_model, init_params
from megatransformer_jax.runs import evaluate as scoring
from megatransformer_jax.runs.build import require_transformer
from megatransformer_jax.runs.cost import cost_tables, make_report
from megatransformer_jax.runs.load import LoadedModel, load_model, model_of_run
from megatransformer_jax.runs.train import Run
from megatransformer_jax.runs.workdir import shown_logs
from megatransformer_jax.sharding.rules import Sharder
from megatransformer_jax.training.recorder import read_metrics as read_metrics_file
from megatransformer_jax.types import Batch, DTypePolicy


def load(
    folder: str | os.PathLike[str],
    *,
    step: int | str = "latest",
    weights: typing.Literal["average", "raw"] = "average",
    precision: str | None = None,
    param_dtype: typing.Literal["float32", "stored"] = "float32",
) -> Model:
    """Reads a finished model: the workdir of a run, what `Model.save` wrote, or a Huginn folder.

    Args:
      folder: its files tell which it is. Nothing in it is changed, and the run may be going on.
      step: checkpoint of a run: latest, best (by its checkpoint.best_metric), or a step's number.
      weights: of a run that averages its weights, the average, or raw for those it trains.
      precision: type of activations, 'float32', 'bfloat16' or 'auto'. None: as in training.
      param_dtype: of a Huginn folder's parameters in memory; 'stored' is as in its files.

    Raises:
      UserError: if the folder is neither, or something in it is missing or damaged.

    Example:
      >>> mt.load(run).trained_depth
      4
    """
    return Model(
        load_model(
            pathlib.Path(folder),
            step=step,
            precision=precision,
            param_dtype=param_dtype,
            weights=weights,
        )
    )


def create(
    model: str | ModelConfig,
    *,
    tokenizer: Tokenizer | None = None,
    seed: int = 0,
    precision: str = "auto",
    **options: Any,
) -> Model:
    """A model with new weights.

    Args:
      model: a preset, such as 'tiny' or 'recurrent_small', or a configuration.
      tokenizer: between text and ids; the vocabulary has its size unless `vocab_size` is given.
        None: inputs must be ids.
      seed: of the weights.
      precision: type of activations, 'float32', 'bfloat16' or 'auto'.
      **options: of the model, over the preset's: core_layers=2, recurrence={"mean_steps": 4}.

    Raises:
      UserError: if an option is not known or cannot be used.

    Example:
      >>> model = mt.create("tiny", tokenizer=mt.BytesTokenizer(), core_layers=1)
      >>> model("abc", depth=2).logits.shape
      (1, 4, 259)
    """
    if tokenizer is not None and "vocab_size" not in options and isinstance(model, str):
        options["vocab_size"] = tokenizer.vocab_size
    if isinstance(model, str):
        values = merge(load_preset(model)["model"], _as_declared(options, ModelConfig))
        check_values(values, ModelConfig)
        config: ModelConfig = construct(ModelConfig, values)
    else:
        config = dataclasses.replace(model, **options) if options else model
    if tokenizer is not None and config.vocab_size < tokenizer.vocab_size:
        raise ConfigError(
            "vocab_size",
            f"{config.vocab_size} is less than the {tokenizer.vocab_size} ids of the tokenizer; "
            "raise it, or leave it out.",
        )
    platform = jax.default_backend()
    policy = DTypePolicy.from_precision(precision, platform)
    module = build_model(config, policy, Sharder(), platform)
    params = init_params(module, jax.random.key(seed))
    depth = config.recurrence.mean_steps if config.is_recurrent else None
    name = model if isinstance(model, str) else "model"
    return Model(LoadedModel(config, module, params, tokenizer, depth, f"new {name}, seed {seed}"))


def configure(experiment: str | None = None, **options: Any) -> RunConfig:
    """The configuration of a run, checked.

    What comes later wins: defaults, preset, experiment, `options`.

    Args:
      experiment: a shipped experiment ('recurrent', 'reasoning:tiny'), a preset ('tiny'), or a
        file (.py, .yaml, .json, such as the config.json of a run).
      **options: by section, data={"source": "text", "files": ["a.txt"]}, or by path,
        **{"train.steps": 200}.

    Raises:
      UserError: if an option is not known or cannot be used; names the nearest.

    Example:
      >>> config = mt.configure("recurrent:tiny", train={"steps": 40})
      >>> config.train.steps, config.model.width
      (40, 64)
    """
    nested: dict[str, Any] = {}
    for name, value in options.items():
        for part in reversed(name.split(".")):
            value = {part: value}
        nested = merge(nested, value)
    return resolve(experiment, _as_declared(nested, RunConfig))


def evaluate(model: Model, **options: Any) -> Report:
    """Scores a model at several depths; the result prints itself as a table and has `.rows`.

    Args:
      model: to be scored.
      **options: those of `megatransformer evaluate`: files="my/*.txt" (else the held-out data of
        the model's run), depths=(1, 2, 4), num_batches, sequence_length, batch_size, seed; with
        references="my/references.jsonl" the options of `generate` too.

    Raises:
      UserError: if an option is not known or does not fit the model, or data cannot be read.

    Example:
      >>> report = mt.evaluate(lm, depths=(1, 4), num_batches=1)
      >>> [row["depth"] for row in report.rows]
      [1, 4]
    """
    declared = {option.path: option for option in options_of(ScoringConfig)}
    given = declared_values(options, declared | dict(OF_GENERATION))
    of_generation = {name: given[name] for name in given if name not in declared}
    config = ScoringConfig(**{name: given[name] for name in given if name in declared})
    check_generation(of_generation, has_prompts=config.references is not None)
    generation = GenerationConfig.of(**{"strategy": "greedy", **of_generation})
    with out_of_memory_is_bad_input():
        return scoring.evaluate(model._loaded, config, generation)


def inspect(run: RunConfig | Model | str, **options: Any) -> Report:
    """What a run costs before it starts: parameters, FLOPs and cache by depth, memory of training.

    Nothing of the model's size is allocated.

    Args:
      run: a configuration, a model, or what `configure` takes.
      **options: with a name, as of `configure`.

    Raises:
      UserError: if something in it cannot be used.

    Example:
      >>> report = mt.inspect("huginn_3_5b", evaluation={"final_depths": (1, 32)})
      >>> [row["depth"] for row in report.rows]
      [1, 32]
    """
    if isinstance(run, str):
        config = configure(run, **options)
    elif options:
        raise UserError(f"{next(iter(options))}: options go with the name of an experiment alone.")
    elif isinstance(run, Model):
        config = run._loaded.run_config or build({"model": dataclasses.asdict(run.config)})
    else:
        config = run
    cost = make_report(config)
    rows = [dataclasses.asdict(row) for row in cost.depths]
    return Report(rows, cost_tables(cost, config), cost.write)


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, int | float]]:
    """Every step's metrics of a run, exact to the bit.

    Args:
      path: the folder of the run, or its metrics.jsonl.

    Raises:
      UserError: if there is no such file, or a line cannot be read.

    Example:
      >>> rows = mt.read_metrics(run)
      >>> rows[0]["step"], "loss" in rows[0]
      (1, True)
    """
    file = pathlib.Path(path).expanduser()
    file = file / "metrics.jsonl" if file.is_dir() else file
    if not file.is_file():
        raise UserError(f"{file} does not exist; name the folder of a run that has begun.")
    return read_metrics_file(file)


# ------------------------------------------------------------------------------
# Training.

# In place of a workdir: that of the configuration.
_OF_CONFIG = "workdir of the configuration"


class Trainer:
    """Trains what a configuration describes: step by step, or to the end.

    Nothing is built or locked before it is needed. A workdir with a checkpoint is resumed bit for
    bit. Used as a context manager, or by `close`, it lets go of the workdir; so it does when it is
    forgotten.

    Args:
      config: see `configure`.
      workdir: folder of the run. None: nothing is written. Default: `config.workdir`.

    Raises:
      UserError: if the workdir cannot be used.

    Example:
      >>> trainer = mt.Trainer(mt.configure("recurrent:tiny", train={"steps": 20}), workdir=None)
      >>> first = trainer.step()
      >>> trainer.step_number, first["loss"] > 0
      (1, True)
      >>> trainer.close()
    """

    def __init__(self, config: RunConfig, workdir: str | os.PathLike[str] | None = _OF_CONFIG):
        if not isinstance(config, RunConfig):
            raise UserError(f"a Trainer takes a RunConfig, see configure; this is {config!r}.")
        self._is_kept = workdir is not None
        if workdir is not None and workdir != _OF_CONFIG:
            config = dataclasses.replace(config, workdir=os.fspath(workdir))
        self.config = config
        self._run: Run | None = None
        self._stack = contextlib.ExitStack()
        self._finalizer = weakref.finalize(self, self._stack.close)

    @classmethod
    def resume(cls, workdir: str | os.PathLike[str], **options: Any) -> "Trainer":
        """Goes on with the run in a folder.

        Args:
          workdir: of a run that has begun.
          **options: as of `configure`, over the run's own, such as train={"steps": 400}.

        Raises:
          UserError: if there is no such run, or it cannot go on with these options.

        Example:
          >>> with mt.Trainer.resume(run) as trainer:
          ...     trainer.step_number
          20
        """
        file = pathlib.Path(workdir).expanduser() / "config.json"
        if not file.is_file():
            raise UserError(f"{file} does not exist; name the folder of a run that has begun.")
        return cls(configure(str(file), **options), workdir)

    @property
    def step_number(self) -> int:
        """Optimiser steps done."""
        return self._opened().step

    def step(self, batch: Batch | None = None) -> dict[str, float]:
        """One optimiser step, without validation, samples and checkpoints.

        Args:
          batch: tokens of your own, on the host. None: the next batch of the run's data.

        Returns:
          The step's metrics, such as loss, accuracy, grad_norm, num_steps (the depth that was
          drawn), tokens, learning_rate.

        Raises:
          UserError: if all steps are done, the batch does not fit the model, or too many steps in a
            row were not finite.
        """
        run = self._opened()
        if run.step >= self.config.train.steps:
            raise UserError(
                f"all {self.config.train.steps} steps are done; raise train.steps to go on."
            )
        if batch is not None:
            self._check(batch)
        return run.advance(batch)

    def run(self) -> bool:
        """Trains to the end, with progress, validation, samples, checkpoints and a summary.

        Ctrl-C finishes the step, saves and returns.

        Returns:
          Whether all steps are done. Without a workdir, what was interrupted can go on by calling
          it again.

        Raises:
          UserError: if too many steps in a row were not finite.
        """
        with shown_logs(self.config.logging.level):
            return self._opened().finish().is_finished

    @property
    def model(self) -> Model:
        """The model as it is now, with the weights that validation uses; later steps leave it.

        Raises:
          UserError: if the run trains something else than a transformer.
        """
        require_transformer(self.config)
        run = self._opened()
        device = jax.local_devices()[0]
        # Copies: the next step gives its own arrays away.
        params = jax.tree.map(
            lambda leaf: jnp.copy(jax.device_put(leaf, device)), run.params_of(run.state)
        )
        return Model(
            model_of_run(run.config, params, run.workdir, run.kind.vocabulary.digest, run.step)
        )

    def save(self) -> pathlib.Path:
        """Saves a checkpoint of the present step into the workdir, and waits for it.

        Returns:
          The workdir.

        Raises:
          UserError: without a workdir.
        """
        if not self._is_kept:
            raise UserError(
                "this Trainer has workdir=None, so it writes nothing; trainer.model.save(folder) "
                "writes the model."
            )
        run = self._opened()
        run.save()
        return run.workdir

    def close(self) -> None:
        """Lets go of the workdir and of the data; the next call opens them again."""
        self._stack.close()
        self._run = None

    def __enter__(self) -> "Trainer":
        return self

    def __exit__(self, *unused: object) -> None:
        self.close()

    def __repr__(self) -> str:
        where = self.config.workdir if self._is_kept else "no workdir"
        done = "" if self._run is None else f"step {self._run.step} of "
        return f"Trainer({where}, {done}{self.config.train.steps} steps)"

    def _opened(self) -> Run:
        if self._run is None:
            try:
                with shown_logs(self.config.logging.level):
                    self._run = Run(self.config, self._stack, is_kept=self._is_kept)
            except BaseException:
                self._stack.close()
                raise
        return self._run

    def _check(self, batch: Batch) -> None:
        """Checks a batch from outside.

        Raises:
          UserError: naming what does not fit.
        """
        model = self.config.model
        shape = np.shape(batch.tokens)
        for name, array in batch._asdict().items():
            if name != "media" and np.shape(array) != shape:
                raise UserError(
                    f"batch.{name} has the shape {np.shape(array)}, and tokens {shape}."
                )
        if len(shape) != 2 or shape[0] % self.config.train.accumulation:
            raise UserError(
                f"batch.tokens has the shape {shape}; it must be [rows, tokens], rows a multiple "
                f"of train.accumulation={self.config.train.accumulation}."
            )
        if shape[1] > model.max_length:
            raise UserError(
                f"batch.tokens has rows of {shape[1]} tokens, and the model reads at most "
                f"max_length={model.max_length}; shorten them."
            )
        for name in ("tokens", "targets"):
            ids = np.asarray(getattr(batch, name))
            wrong = ids[(ids < 0) | (ids >= model.vocab_size)]
            if not np.issubdtype(ids.dtype, np.integer) or wrong.size:
                what = ids.dtype if not wrong.size else wrong.flat[0]
                raise UserError(
                    f"batch.{name} holds {what}; ids are whole numbers from 0 to "
                    f"{model.vocab_size - 1}."
                )
        tokenizer = self._opened().kind.vocabulary
        if model.has_media:
            check_media(batch, typing.cast(Any, tokenizer).tokenizer)


def _as_declared(nested: Mapping[str, Any], config_class: type) -> dict[str, Any]:
    """Nested values with tuples where they are declared; `build` reports names that are not."""
    hints = typing.get_type_hints(config_class)
    converted: dict[str, Any] = {}
    for name, value in plain(nested).items():
        declared = hints.get(name)
        if dataclasses.is_dataclass(declared) and isinstance(value, Mapping):
            converted[name] = _as_declared(value, typing.cast(type, declared))
        else:
            converted[name] = as_tuple(value, declared)
    return converted
