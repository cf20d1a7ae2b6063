"""The public face: models, training and evaluation in a few lines of Python.

Everything here is reached as `import megatransformer_jax as mt; mt.load(...)`. Options have the
names of the configuration and of the command line; one that is not known is an error that names the
nearest.
"""

import contextlib
import dataclasses
import os
import typing
import weakref
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from megatransformer_jax.config.build import (
    build,
    construct,
    load_preset,
    merge,
    plain,
)
from megatransformer_jax.config.build import configure as resolve
from megatransformer_jax.config.compiling import CompileConfig
from megatransformer_jax.config.data import DataConfig
from megatransformer_jax.config.exporting import ProgramConfig
from megatransformer_jax.config.generation import GenerationConfig
from megatransformer_jax.config.loop import ModelMeshConfig
from megatransformer_jax.config.model import ModelConfig
from megatransformer_jax.config.option import (
    MAX_SEED,
    ConfigError,
    UserError,
    as_python,
    as_tuple,
    as_whole,
    declared_values,
    from_options,
    options_of,
)
from megatransformer_jax.config.run_base import BaseRunConfig
from megatransformer_jax.config.run_kinds import AllOptions, require_transformer
from megatransformer_jax.config.scoring import OF_GENERATION, ScoringConfig, check_generation
from megatransformer_jax.data.batches import check_batch
from megatransformer_jax.data.media.encoding import check_media
from megatransformer_jax.data.tokenizer import Tokenizer
from megatransformer_jax.evaluation.report import Report
from megatransformer_jax.generation.request import out_of_memory_is_bad_input
from megatransformer_jax.model import Model
from megatransformer_jax.models.megatransformer import build_model, init_params
from megatransformer_jax.runs import evaluate as scoring
from megatransformer_jax.runs.cost import cost_tables, make_report
from megatransformer_jax.runs.load import (
    LoadedModel,
    check_precision,
    load_model,
    model_of_run,
)
from megatransformer_jax.runs.train import Run
from megatransformer_jax.runs.workdir import shown_logs, use_compilation_cache
from megatransformer_jax.sharding.rules import Sharder
from megatransformer_jax.storage import (
    CHECKPOINTS,
    NO_CHECKPOINTS,
    AnyPath,
    absolute,
    as_path,
    local_path,
)
from megatransformer_jax.training.recorder import read_metrics as read_metrics_file
from megatransformer_jax.types import Batch, DTypePolicy

# What `inspect` takes about TPUs and GPUs that programs are compiled for.
_COMPILE_OPTIONS = tuple(option.path for option in options_of(CompileConfig))


def load(
    folder: str | os.PathLike[str],
    *,
    revision: str | None = None,
    step: int | str = "latest",
    weights: typing.Literal["average", "raw"] = "average",
    precision: str | None = None,
    param_dtype: typing.Literal["float32", "stored"] = "float32",
    mesh: Mapping[str, int] | None = None,
) -> Model:
    """Reads a finished model: the workdir of a run, what `Model.save` wrote, or a folder of a known
    format of another project (docs/checkpoints.md).

    Args:
      folder: its files tell which it is. Nothing in it is changed, and the run may be going on. Or
        the name of a model on the Hugging Face hub, 'org/name', which is downloaded into its cache
        (extra 'hub'); a folder of that name wins.
      revision: branch, tag or commit of a model on the hub. None: its main branch.
      step: checkpoint of a run: latest, best (by its checkpoint.best_metric), or a step's number.
      weights: of a run that averages its weights, the average, or raw for those it trains.
      precision: type of activations, 'float32', 'bfloat16' or 'auto'. None: as in training.
      param_dtype: of another project's parameters in memory; 'stored' is as in its files.
      mesh: devices that share the model: {"tensor": 2} divides its heads, feed-forward layers and
        vocabulary, {"data": 4} the texts of a call or of a server. None: it is on the first one.

    Raises:
      UserError: if the folder is neither, or something in it is missing or damaged.

    Examples:
      >>> mt.load(run).trained_depth
      4
    """
    use_compilation_cache("auto")
    return Model(
        load_model(
            folder if isinstance(folder, str) and folder else as_path("folder", folder),
            revision=revision,
            step=as_python(step),
            precision=precision,
            param_dtype=param_dtype,
            weights=weights,
            mesh=from_options(ModelMeshConfig, dict(mesh or {})),
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
      **options: of the model, over the preset's or the configuration's: core_layers=2,
        recurrence={"mean_steps": 4} or **{"recurrence.mean_steps": 4}.

    Raises:
      UserError: if an option is not known or cannot be used.

    Examples:
      >>> model = mt.create("tiny", tokenizer=mt.BytesTokenizer(), core_layers=1)
      >>> model("abc", depth=2).logits.shape
      (1, 4, 259)
    """
    if not isinstance(model, (str, ModelConfig)):
        raise UserError(f"model: {model!r} is neither the name of a preset nor a ModelConfig.")
    is_tokenizer = isinstance(tokenizer, Tokenizer) and not isinstance(tokenizer, type)
    if tokenizer is not None and not is_tokenizer:
        raise UserError(
            f"tokenizer: {tokenizer!r} is not a tokenizer; give one such as mt.BytesTokenizer()."
        )
    check_precision(precision)
    seed = as_whole("seed", seed, 0, MAX_SEED)
    if tokenizer is not None and "vocab_size" not in options and isinstance(model, str):
        options["vocab_size"] = tokenizer.vocab_size
    below = load_preset(model)["model"] if isinstance(model, str) else dataclasses.asdict(model)
    values = merge(below, _as_declared(_nested(options), ModelConfig))
    config: ModelConfig = construct(ModelConfig, values)
    if tokenizer is not None and config.vocab_size < tokenizer.vocab_size:
        raise ConfigError(
            "vocab_size",
            f"{config.vocab_size} is less than the {tokenizer.vocab_size} ids of the tokenizer; "
            "raise it, or leave it out.",
        )
    use_compilation_cache("auto")
    platform = jax.default_backend()
    policy = DTypePolicy.from_precision(precision, platform)
    module = build_model(config, policy, Sharder(), platform)
    params = init_params(module, jax.random.key(seed))
    depth = config.recurrence.mean_steps if config.is_recurrent else None
    name = model if isinstance(model, str) else "model"
    return Model(LoadedModel(config, module, params, tokenizer, depth, f"new {name}, seed {seed}"))


def configure(experiment: str | os.PathLike[str] | None = None, **options: Any) -> BaseRunConfig:
    """The configuration of a run, checked.

    What comes later wins: defaults, preset, experiment, `options`.

    Args:
      experiment: a shipped experiment ('recurrent', 'reasoning:tiny'), a preset ('tiny'), or a
        file (.py, .yaml, .json, such as the config.json of a run).
      **options: by section, data={"source": "text", "files": ["a.txt"]}, or by path,
        **{"train.steps": 200}.

    Raises:
      UserError: if an option is not known or cannot be used; names the nearest.

    Examples:
      >>> config = mt.configure("recurrent:tiny", train={"steps": 40})
      >>> config.train.steps, config.model.width
      (40, 64)
    """
    if isinstance(experiment, os.PathLike):
        experiment = str(as_path("experiment", experiment))
    if experiment is not None and not isinstance(experiment, str):
        raise UserError(
            f"experiment: {experiment!r} is neither a name nor a file; give one such as 'tiny'."
        )
    return resolve(experiment, _as_declared(_nested(options), AllOptions))


def evaluate(model: Model, **options: Any) -> Report:
    """Scores a model at several depths; the result prints itself as a table and has `.rows`.

    Args:
      model: to be scored.
      **options: those of `megatransformer evaluate`: files="my/*.txt" (else the held-out data of
        the model's run), depths=(1, 2, 4), num_batches, sequence_length, batch_size, seed; with
        references="my/references.jsonl" the options of `generate` too.

    Raises:
      UserError: if an option is not known or does not fit the model, or data cannot be read.

    Examples:
      >>> report = mt.evaluate(lm, depths=(1, 4), num_batches=1)
      >>> [row["depth"] for row in report.rows]
      [1, 4]
    """
    if not isinstance(model, Model):
        raise UserError(
            f"model: {model!r} is not an mt.Model; read a folder with mt.load, or take "
            "Trainer.model."
        )
    declared = {option.path: option for option in options_of(ScoringConfig)}
    given = declared_values(options, declared | dict(OF_GENERATION))
    of_generation = {name: given[name] for name in given if name not in declared}
    config = ScoringConfig(**{name: given[name] for name in given if name in declared})
    check_generation(of_generation, has_prompts=config.references is not None)
    generation = GenerationConfig.of(**{"strategy": "greedy", **of_generation})
    with out_of_memory_is_bad_input():
        return scoring.evaluate(model._loaded, config, generation)


def export_program(model: Model, folder: str | os.PathLike[str], **options: Any) -> Report:
    """Writes a model as programs that run without this package: StableHLO, or ONNX.

    Args:
      model: of text.
      folder: absent or empty.
      **options: those of `megatransformer export-program`: format="onnx", batch, capacity, chunk,
        criterion=("latent_diff", "kl"), cache_slots, cache_sharing, cache_exited_reads, seed,
        check=True.

    Returns:
      The files with their sizes; with `check` how the programs compare with the model, by depth.

    Raises:
      UserError: if an option is not known or does not fit the model, a package of the extra
        'export' is missing, or the folder cannot be used.

    Examples:
      >>> report = mt.export_program(lm, folder / "program", capacity=64, chunk=16)
      >>> [row["file"] for row in report.rows if row["file"].startswith("p")]
      ['parameters.safetensors', 'prefill.stablehlo', 'program.json']
    """
    # Most sessions never need it.
    from megatransformer_jax.export import folder as exporting  # noqa: PLC0415

    if not isinstance(model, Model):
        raise UserError(f"model: {model!r} is not an mt.Model; read a folder with mt.load.")
    config = from_options(ProgramConfig, options)
    return exporting.export_program(model._loaded, local_path("folder", folder), config)


def inspect(run: BaseRunConfig | Model | str | os.PathLike[str], **options: Any) -> Report:
    """What a run costs before it starts: parameters, FLOPs and cache by depth, memory of training.

    Nothing of the model's size is allocated. With `topology` the programs are compiled for TPUs or
    GPUs that need not be here, and read, as `megatransformer compile` does (docs/pods.md): it takes
    from seconds to minutes and needs the extra 'tpu' or 'cuda'.

    Args:
      run: a configuration, a model, or what `configure` takes.
      **options: with a name, as of `configure`. With all: topology="v4-128", and then slices,
        phase="decode" and the other options of `megatransformer compile`.

    Raises:
      UserError: if something in it cannot be used; libtpu is missing or in use, or the CUDA plugin
        is missing.

    Examples:
      >>> report = mt.inspect("huginn_3_5b", evaluation={"final_depths": (1, 32)})
      >>> [row["depth"] for row in report.rows]
      [1, 32]
    """
    compiling = {name: options.pop(name) for name in _COMPILE_OPTIONS if name in options}
    if isinstance(run, (str, os.PathLike)):
        config = configure(run, **options)
    elif not isinstance(run, (Model, BaseRunConfig)):
        raise UserError(
            f"run: {run!r} is neither a RunConfig, an mt.Model nor the name of an experiment."
        )
    elif options:
        raise UserError(f"{next(iter(options))}: options go with the name of an experiment alone.")
    elif isinstance(run, Model):
        length = min(DataConfig().sequence_length, run.config.max_length)
        config = run._loaded.run_config or build(
            {"model": dataclasses.asdict(run.config), "data": {"sequence_length": length}}
        )
    else:
        config = run
    if compiling:
        return _compiled_report(config, from_options(CompileConfig, compiling))
    cost = make_report(config)
    rows = [dataclasses.asdict(row) for row in cost.depths]
    return Report(rows, cost_tables(cost, config), cost.write)


def _compiled_report(config: BaseRunConfig, compiling: CompileConfig) -> Report:
    """A row per program."""
    # Most sessions never need it.
    from megatransformer_jax.runs.compile import compile_for_topology  # noqa: PLC0415
    from megatransformer_jax.runs.compile_tables import (  # noqa: PLC0415
        compile_rows,
        compile_tables,
    )

    compiled = compile_for_topology(config, compiling)
    return Report(compile_rows(compiled), compile_tables(compiled), compiled.write)


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, int | float]]:
    """Every step's metrics of a run, exact to the bit.

    Args:
      path: the folder of the run, or its metrics.jsonl.

    Raises:
      UserError: if there is no such file, or a line cannot be read.

    Examples:
      >>> rows = mt.read_metrics(run)
      >>> rows[0]["step"], "loss" in rows[0]
      (1, True)
    """
    return read_metrics_file(path)


# ------------------------------------------------------------------------------
# Training.

# In place of a workdir: that of the configuration.
_OF_CONFIG = "workdir of the configuration"


class Trainer:
    """Trains what a configuration describes: step by step, or to the end.

    Nothing is built or locked before it is needed. A workdir with a checkpoint is resumed bit for
    bit. `close`, or the end of a `with` block, saves and lets go of the workdir. A trainer that is
    forgotten lets go too, without saving.

    Args:
      config: see `configure`.
      workdir: folder of the run. None: nothing is written. Default: `config.workdir`.

    Raises:
      UserError: if the workdir cannot be used.

    Examples:
      >>> trainer = mt.Trainer(mt.configure("recurrent:tiny", train={"steps": 20}), workdir=None)
      >>> first = trainer.step()
      >>> trainer.step_number, first["loss"] > 0
      (1, True)
      >>> trainer.close()
    """

    def __init__(self, config: BaseRunConfig, workdir: str | os.PathLike[str] | None = _OF_CONFIG):
        if not isinstance(config, BaseRunConfig):
            raise UserError(f"a Trainer takes a RunConfig, see configure; this is {config!r}.")
        self._is_kept = workdir is not None
        chosen = config.workdir if workdir in (None, _OF_CONFIG) else workdir
        # Absolute, so that a later change of the working directory starts no other run.
        folder = absolute(as_path("workdir", chosen, CHECKPOINTS, NO_CHECKPOINTS))
        self.config = dataclasses.replace(config, workdir=str(folder))
        self._run: Run | None = None
        self._last_step: int | None = None
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

        Examples:
          >>> with mt.Trainer.resume(run) as trainer:
          ...     trainer.step_number
          20
        """
        file = as_path("workdir", workdir, CHECKPOINTS, NO_CHECKPOINTS) / "config.json"
        if not file.is_file():
            raise UserError(f"{file} does not exist; name the folder of a run that has begun.")
        return cls(configure(str(file), **options), workdir)

    @property
    def step_number(self) -> int:
        """Optimiser steps done; of a closed trainer, when it was closed."""
        if self._run is None and self._last_step is not None:
            return self._last_step
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
            batch = self._checked(batch)
        with shown_logs(self.config.logging.level):
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
        config = require_transformer(run.config)
        device = jax.local_devices()[0]
        # Copies: the next step gives its own arrays away.
        params = jax.tree.map(
            lambda leaf: jnp.copy(jax.device_put(leaf, device)), run.params_of(run.state)
        )
        where = f"run {run.workdir.root}" if self._is_kept else "run without a workdir"
        description = f"{where}, step {run.step}"
        return Model(model_of_run(config, params, run.workdir.root, run.task.digest, description))

    def save(self) -> AnyPath:
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
        return run.workdir.root

    def close(self) -> None:
        """Saves the steps that no checkpoint has, and lets go of the workdir and of the data.

        The next step opens them again. With workdir=None everything is gone: read `model` before.
        """
        self._close(saves=True)

    def __enter__(self) -> "Trainer":
        return self

    def __exit__(self, error: object, *unused: object) -> None:
        self._close(saves=error is None)

    def __repr__(self) -> str:
        where = self.config.workdir if self._is_kept else "no workdir"
        done = "" if self._run is None else f"step {self._run.step} of "
        return f"Trainer({where}, {done}{self.config.train.steps} steps)"

    def _close(self, *, saves: bool) -> None:
        run, self._run = self._run, None
        if run is None:
            return
        self._last_step = run.step
        with self._stack:
            if saves and self._is_kept and run.has_unsaved_steps:
                run.save()

    def _opened(self) -> Run:
        if self._run is None:
            if self._last_step is not None and not self._is_kept:
                raise UserError(
                    "this Trainer is closed, and with workdir=None nothing of it was kept; read "
                    ".model before, or give it a workdir."
                )
            try:
                with shown_logs(self.config.logging.level):
                    self._run = Run(self.config, self._stack, is_kept=self._is_kept)
            except BaseException:
                self._stack.close()
                raise
        return self._run

    def _checked(self, batch: Any) -> Batch:
        """A batch from outside.

        Raises:
          UserError: naming what does not fit.
        """
        config = require_transformer(self.config)
        checked = check_batch(batch, config.model, config.train.accumulation)
        if config.model.has_media:
            if checked.media is None:
                raise UserError("batch.media is None; a model with media needs a MediaBatch.")
            check_media(checked, typing.cast(Any, self._opened().task).tokenizer)
        return checked


def _nested(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options by path, {"train.steps": 2}, as sections, {"train": {"steps": 2}}.

    Raises:
      ConfigError: if an option is given twice.
    """
    nested: dict[str, Any] = {}
    for name, value in options.items():
        for part in reversed(name.split(".")):
            value = {part: value}
        twice = _leaf_paths(nested) & _leaf_paths(value)
        if twice:
            raise ConfigError(min(twice), "is given twice; give it once.")
        nested = merge(nested, value)
    return nested


def _leaf_paths(nested: Mapping[str, Any], prefix: str = "") -> set[str]:
    paths: set[str] = set()
    for name, value in nested.items():
        path = f"{prefix}{name}"
        paths |= _leaf_paths(value, f"{path}.") if isinstance(value, Mapping) else {path}
    return paths


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
