"""Reads a model for generation: the workdir of a run, or a checkpoint folder of another project."""

import dataclasses
import functools
import json
import pathlib
import typing
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from flax.traverse_util import flatten_dict

from megatransformer_jax.checkpoints.folders import (
    CONFIG_FILE,
    FORMATS,
    ParamDtype,
    format_of,
    open_folder,
)
from megatransformer_jax.checkpoints.foreign import Format
from megatransformer_jax.checkpoints.hub import find_model
from megatransformer_jax.checkpoints.manager import CheckpointManager
from megatransformer_jax.checkpoints.quantized import (
    is_quantized_folder,
    read_about,
    read_quantized,
    refuse_quantized,
)
from megatransformer_jax.checkpoints.tensor_map import Place
from megatransformer_jax.config.build import build, read_values
from megatransformer_jax.config.calibration import CALIBRATION_FILE, Calibration
from megatransformer_jax.config.generation import GenerationConfig
from megatransformer_jax.config.loop import ModelMeshConfig
from megatransformer_jax.config.model import ModelConfig
from megatransformer_jax.config.option import ConfigError, UserError, nearest_hint
from megatransformer_jax.config.quantization import QuantizationConfig
from megatransformer_jax.config.run import RunConfig
from megatransformer_jax.config.run_base import BaseRunConfig
from megatransformer_jax.config.run_kinds import require_transformer
from megatransformer_jax.data.hf_tokenizer import (
    TOKENIZER_FILE,
    load_huggingface_tokenizer,
)
from megatransformer_jax.data.pipeline import data_tokenizer
from megatransformer_jax.data.reasoning.symbol_tokenizer import SymbolTokenizer
from megatransformer_jax.data.tokenizer import BytesTokenizer, Tokenizer, load_sentencepiece
from megatransformer_jax.generation.generator import Generator
from megatransformer_jax.models.megatransformer import (
    MegaTransformer,
    abstract_params,
    build_model,
    param_axes,
)
from megatransformer_jax.models.weights import computed_weights
from megatransformer_jax.sharding.mesh import model_sharder
from megatransformer_jax.sharding.rules import Sharder
from megatransformer_jax.storage import AnyPath, as_path, is_bucket_path
from megatransformer_jax.training.evaluation_params import (
    evaluates_an_average,
    restore_evaluation_params,
)
from megatransformer_jax.types import DTypePolicy

RunType = typing.TypeVar("RunType", bound=BaseRunConfig)
# Which checkpoint of a run.
Step = Literal["latest", "best"] | int

SENTENCEPIECE_FILE = "tokenizer.model"
# In a workdir: Hugging Face's files, if the run started from a model that came with them.
HUGGINGFACE_FOLDER = "tokenizer"
PRECISIONS = ("auto", "float32", "bfloat16")


@dataclasses.dataclass(frozen=True)
class LoadedModel:
    """A model ready to generate.

    Attributes:
      config: the architecture.
      model: the module, without a mesh unless `load_model` was told of one.
      params: its parameters, on the first local device or where `load_model` was told to. NumPy
        arrays on the host if passes compute in another type, and for a TPU, so that the device
        has room for `weights` alone.
      tokenizer: between text and ids; of a reasoning task its symbols. None: the folder has none,
        so that prompts must be ids.
      trained_depth: mean iterations in training, None without a core.
      description: what was loaded, for people.
      run_config: of the run that the model comes from; None: it comes from no run of ours.
      quantization: how its matrices are quantised. None: they are not.
      quantized_from: what was quantised, for people. None: it is not quantised.
      calibration: thresholds of exit criteria that were found for it. None: nobody has looked.
      checkpoint: step and weights ('average', 'raw') of a run. None: it is not of a run.
    """

    config: ModelConfig
    model: MegaTransformer
    params: Any
    tokenizer: Tokenizer | None
    trained_depth: int | None
    description: str
    run_config: RunConfig | None = None
    quantization: QuantizationConfig | None = None
    quantized_from: str | None = None
    calibration: Calibration | None = None
    checkpoint: tuple[int, str] | None = None

    @property
    def task(self) -> str:
        """What it was trained on: 'text' (also if no run says), 'reasoning' or 'media'."""
        return "text" if self.run_config is None else self.run_config.task

    @functools.cached_property
    def weights(self) -> Any:
        """The parameters as passes compute with them, on the device; made once."""
        return computed_weights(self.model, self.params)

    def generator(self, config: GenerationConfig) -> Generator:
        """Generates with this model as `config` says, which must have been checked against it."""
        given = self.model, self.weights, self.tokenizer, config, self.trained_depth
        return Generator(*given, calibration=self.calibration)


def load_model(
    path: str | AnyPath,
    *,
    step: Step | str = "latest",
    precision: str | None = None,
    param_dtype: ParamDtype = "float32",
    sharder: Sharder | None = None,
    mesh: ModelMeshConfig | None = None,
    weights: Literal["average", "raw"] = "average",
    revision: str | None = None,
) -> LoadedModel:
    """Reads the parameters of a run or of another project's folder; its files tell which it is.

    Of a run only the checkpoint and the tokenizer are read, never its data, and nothing in the
    workdir is changed; the run may be going on.

    Args:
      path: a workdir (checkpoints/ in it), which may be at gs://, or a folder with config.json and
        safetensors of one of the known formats (`checkpoints/folders.py`), or the name of such a
        model on the Hugging Face hub, which is downloaded (`checkpoints/hub.py`).
      step: which checkpoint of a run; see `parse_step` for the values.
      precision: type of activations, one of `PRECISIONS`. None: as the run was trained, and 'auto'
        for another project's folder.
      param_dtype: of another project's parameters, see `ForeignCheckpoint.params`. Those of runs
        are float32.
      sharder: places the parameters on its mesh; the model knows nothing of it. None: on the first
        local device.
      mesh: lays the model itself over devices, so that what it computes is divided among them.
        None: it is on the first one.
      weights: 'average' is what the run was judged by: the average of its weights, if it keeps one.
        'raw' is what it trains then.
      revision: of a model on the hub, its branch, tag or commit.

    Raises:
      UserError: if the folder is neither, or something in it is missing or damaged.
    """
    step = parse_step(step)
    if precision is not None:
        check_precision(precision)
    _check_choice("weights", weights, ("average", "raw"))
    _check_choice("param_dtype", param_dtype, ("float32", "stored"))
    folder = find_model(path, revision)
    if is_quantized_folder(folder):
        for name, value, default in (
            ("step", step, "latest"),
            ("weights", weights, "average"),
            ("param_dtype", param_dtype, "float32"),
        ):
            if value != default:
                raise ConfigError(
                    name, f"{value!r} does not go with {folder}, a quantised model; leave it out."
                )
        if mesh is not None and mesh.num_devices > 1:
            raise ConfigError(
                "mesh",
                f"{folder} is a quantised model, which is on one device; leave the mesh out, or "
                "load the model that was quantised.",
            )
        return _load_quantized(folder, precision)
    if (foreign := foreign_format(folder)) is not None:
        if step != "latest":
            raise UserError(
                f"step={step!r} does not go with {folder}: a {foreign.title} folder has one set of "
                "weights. Leave step out."
            )
        if weights != "average":
            raise _no_average(weights, folder)
        loaded = _load_foreign(folder, precision or "auto", param_dtype, sharder, mesh)
        if folder == as_path("model", path):
            return loaded
        name = f"{path}" if revision is None else f"{path}@{revision}"
        return dataclasses.replace(loaded, description=f"{foreign.title} model {name}")
    return _load_run(folder, step, precision, sharder, mesh, weights)


def read_model_config(path: str | AnyPath) -> ModelConfig:
    """The architecture of what `load_model` reads, without its weights.

    Raises:
      UserError: if there is no such model, or its configuration cannot be used.
    """
    folder = find_model(path)
    format = foreign_format(folder)
    if format is None:
        return read_run_config(folder).model
    file = folder / CONFIG_FILE
    return format.read_config(read_values(file), str(file))


def check_precision(precision: str) -> None:
    """Checks a type of activations by its name.

    Raises:
      ConfigError: unless it is one of `PRECISIONS`.
    """
    _check_choice("precision", precision, PRECISIONS)


def _check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        hint = nearest_hint(value, choices) if isinstance(value, str) else ""
        raise ConfigError(name, f"{value!r} is unknown; {hint}known: {', '.join(choices)}.")


def parse_step(value: str | int) -> Step:
    """Which checkpoint: 'latest', 'best' (by its checkpoint.best_metric), or the number of a step.

    Raises:
      UserError: for anything else.
    """
    match value:
        case "latest":
            return "latest"
        case "best":
            return "best"
        case int() if not isinstance(value, bool) and value >= 0:
            return value
        case str() if value.isdecimal():
            return int(value)
    raise UserError(f"step={value!r}: give latest, best, or the number of a step.")


def foreign_format(folder: AnyPath) -> Format | None:
    """The format of another project's folder. None: it is the workdir of a run.

    Raises:
      UserError: if it is neither, saying what was looked for; if its architecture is unknown; if
        it is a quantised model.
    """
    refuse_quantized(folder)
    if not folder.is_dir():
        what = "is a file" if folder.is_file() else "no such folder"
        if is_bucket_path(folder):
            raise UserError(f"{folder}: {what} in the bucket. Name the workdir of a run.")
        raise UserError(
            f"{folder}: {what}. Name the workdir of a run, or a folder of a known format "
            f"({_titles()}); paths are relative to {pathlib.Path.cwd()}."
        )
    config_file = folder / CONFIG_FILE
    values = read_values(config_file) if config_file.is_file() else {}
    is_run = "model" in values and "train" in values
    found_format = None if is_run else format_of(values, str(config_file))
    if found_format is not None and is_bucket_path(folder):
        raise UserError(
            f"{folder} is a {found_format.title} folder. Only runs are read from buckets; copy the "
            "folder to this machine and name it here."
        )
    if found_format is not None:
        return found_format
    if (folder / "checkpoints").is_dir():
        return None
    if is_run:
        raise UserError(f"{folder}: this run has no checkpoints/ yet; train it first.")
    found = ", ".join(sorted(file.name for file in folder.iterdir())[:8]) or "nothing"
    raise UserError(
        f"{folder} is neither the workdir of a run (a folder checkpoints/ in it) nor a folder of a "
        f"known format (config.json of {_titles()}, next to model.safetensors or its shards). It "
        f"has: {found}."
    )


def _titles() -> str:
    return ", ".join(known.title for known in FORMATS)


def _load_foreign(
    folder: AnyPath,
    precision: str,
    param_dtype: ParamDtype,
    sharder: Sharder | None,
    mesh: ModelMeshConfig | None,
) -> LoadedModel:
    checkpoint = open_folder(folder)
    config = checkpoint.config
    model = _build(config, precision, mesh)
    sharder = sharder or _sharder_of(model)
    place = _placer(model, sharder)
    params = checkpoint.params(param_dtype=param_dtype, place=place)
    tokenizer: Tokenizer | None = None
    if (folder / TOKENIZER_FILE).is_file():
        tokenizer = load_huggingface_tokenizer(folder)
    elif (folder / SENTENCEPIECE_FILE).is_file():
        tokenizer = load_sentencepiece(folder / SENTENCEPIECE_FILE)
    else:
        logging.warning(
            "%s has neither %s nor %s, so prompts must be token ids.",
            folder,
            TOKENIZER_FILE,
            SENTENCEPIECE_FILE,
        )
    if tokenizer is not None and tokenizer.vocab_size > config.vocab_size:
        raise UserError(
            f"{folder}: the tokenizer has {tokenizer.vocab_size} ids, but the model only "
            f"{config.vocab_size} (the vocabulary of config.json); they are not of one model."
        )
    description = f"{checkpoint.format.title} model {folder}"
    return _loaded(config, model, params, tokenizer, description)


def _placer(model: MegaTransformer, sharder: Sharder | None) -> Place:
    """Puts each parameter where it belongs as soon as it is read: cut over the mesh of all
    processes, of which each reads the whole file, or on the first local device, or on the host.
    """
    if sharder is None and _stays_on_host(model):
        return lambda path, tensor: tensor
    if sharder is None:
        device = jax.local_devices()[0]
        return lambda path, tensor: jax.device_put(tensor, device)
    axes = flatten_dict(param_axes(model), sep="/")

    def place(path: str, tensor: np.ndarray) -> jax.Array:
        return jax.make_array_from_callback(
            tensor.shape, sharder.sharding(*axes[path]), lambda index: tensor[index]
        )

    return place


def _stays_on_host(model: MegaTransformer) -> bool:
    """Whether the device is to hold other arrays than the parameters, see `LoadedModel.weights`."""
    return model.policy.compute != model.policy.param or model.platform == "tpu"


def _load_run(
    folder: AnyPath,
    step: Step,
    precision: str | None,
    sharder: Sharder | None,
    mesh: ModelMeshConfig | None,
    weights: Literal["average", "raw"],
) -> LoadedModel:
    checkpoints = CheckpointManager(folder / "checkpoints", None)
    try:
        number = find_step(checkpoints, step)
        run = checkpoints.run_info(number)
        config = read_config(run["config"], checkpoints.directory / str(number), RunConfig)
        if weights != "average" and not evaluates_an_average(config):
            raise _no_average(weights, folder)
        tokenizer = _run_tokenizer(config, folder, run["vocabulary"])
        model = _build(config.model, precision or config.train.precision, mesh)
        sharder = sharder or _sharder_of(model)
        params = restore_evaluation_params(checkpoints, number, model, config, sharder, weights)
        if sharder is None and _stays_on_host(model):
            params = jax.device_get(params)
    finally:
        checkpoints.close()
    which = f" ({step})" if isinstance(step, str) else ""
    which += f", {weights} weights" if evaluates_an_average(config) else ""
    loaded = _loaded(config.model, model, params, tokenizer, f"run {folder}, step {number}{which}")
    if (folder / "config.json").is_file():
        # What the run was last told, such as which depths to score.
        config = read_run_config(folder)
    found = read_calibration(folder, number, weights)
    return dataclasses.replace(
        loaded, run_config=config, calibration=found, checkpoint=(number, weights)
    )


def read_calibration(folder: AnyPath, step: int, weights: str) -> Calibration | None:
    """What `megatransformer calibrate` has left in a folder, for a checkpoint; None if nothing."""
    file = folder / CALIBRATION_FILE
    if not file.is_file():
        return None
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        values = None
    return Calibration.of_values(values, step, weights)


def _load_quantized(folder: AnyPath, precision: str | None) -> LoadedModel:
    about = read_about(folder)
    config = read_config(about.run, folder, RunConfig)
    tokenizer = None
    if about.vocabulary is not None:
        tokenizer = _run_tokenizer(config, folder, about.vocabulary)
    of_run = config.train.precision if about.is_of_run else "auto"
    model = _build(config.model, precision or of_run)
    shapes = flatten_dict(jax.tree.map(jnp.shape, abstract_params(model)), sep="/")
    params = read_quantized(folder, shapes)
    return dataclasses.replace(
        _loaded(model.config, model, params, tokenizer, f"quantised model {folder}"),
        run_config=config if about.is_of_run else None,
        quantization=about.config,
        quantized_from=about.source,
    )


def _no_average(weights: str, folder: AnyPath) -> UserError:
    return UserError(
        f"weights={weights!r}: {folder} has one set of weights and no average (as with "
        "train.ema_decay or a schedule-free optimiser). Leave weights out."
    )


def _loaded(
    config: ModelConfig,
    model: MegaTransformer,
    params: Any,
    tokenizer: Tokenizer | None,
    description: str,
) -> LoadedModel:
    depth = config.recurrence.mean_steps if config.is_recurrent else None
    return LoadedModel(config, model, params, tokenizer, depth, description)


def _build(
    config: ModelConfig, precision: str, mesh: ModelMeshConfig | None = None
) -> MegaTransformer:
    platform = jax.default_backend()
    policy = DTypePolicy.from_precision(precision, platform)
    kernel = config.attention.kernel
    if kernel != "auto":
        # The kernel that suits the training run's device may not exist on this one.
        logging.info("attention.kernel=%s of the run is auto for generation", kernel)
        attention = dataclasses.replace(config.attention, kernel="auto")
        config = dataclasses.replace(config, attention=attention)
    sharder = None if mesh is None else model_sharder(mesh, config, jax.devices())
    return build_model(config, policy, sharder or Sharder(), platform)


def _sharder_of(model: MegaTransformer) -> Sharder | None:
    return None if model.sharder.mesh is None else model.sharder


def model_of_run(
    config: RunConfig, params: Any, workdir: AnyPath, digest: str, description: str
) -> LoadedModel:
    """The model of a run that is going on.

    Args:
      config: of the run.
      params: on the first local device.
      workdir: with the run's tokenizer.
      digest: of its vocabulary.
      description: what it is, for people.
    """
    tokenizer = _run_tokenizer(config, workdir, digest)
    model = _build(config.model, config.train.precision)
    loaded = _loaded(config.model, model, params, tokenizer, description)
    return dataclasses.replace(loaded, run_config=config)


def find_step(checkpoints: CheckpointManager, step: Step) -> int:
    """The number of the checkpoint that `parse_step` names.

    Raises:
      UserError: if there is no such checkpoint; lists those there are.
    """
    steps = checkpoints.steps()
    if not steps:
        raise UserError(f"{checkpoints.directory} has no complete checkpoint; train first.")
    known = ", ".join(map(str, steps))
    if step == "latest":
        return steps[-1]
    if step == "best":
        best = checkpoints.best_step()
        if best is None:
            raise UserError(
                f"step='best': no checkpoint in {checkpoints.directory} has a finite "
                f"{checkpoints.ranking().metric}; name one of the steps {known}."
            )
        return best
    if step not in steps:
        raise UserError(
            f"step={step!r}: {checkpoints.directory} has no such checkpoint; it has the steps "
            f"{known}. Others have been deleted as checkpoint.keep_last and its like say."
        )
    return step


def read_run_config(folder: AnyPath) -> RunConfig:
    """The configuration in a workdir.

    Raises:
      UserError: if there is none, or it is of another version of the library.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(f"{path} does not exist; it says what data the run is validated on.")
    try:
        return require_transformer(build(read_values(path)))
    except ConfigError as error:
        raise UserError(
            f"{path} does not fit this version of the library ({error}); use the version that "
            "wrote it."
        ) from error


def read_config(values: dict[str, Any], where: AnyPath, run_type: type[RunType]) -> RunType:
    """The configuration saved with a checkpoint.

    Args:
      values: as saved.
      where: the checkpoint, for messages.
      run_type: of the configuration; it says what the run must have trained.

    Raises:
      UserError: if it is of another version of the library, or of another kind of run.
    """
    try:
        config = build(values)
    except ConfigError as error:
        raise UserError(
            f"the config saved with {where} does not fit this version of the library ({error}); "
            "use the version that wrote it."
        ) from error
    if not isinstance(config, run_type):
        raise UserError(
            f"{where} is of a run with kind={config.kind!r}, and this needs one with "
            f"kind={run_type.kind!r}; name another run."
        )
    return config


def _run_tokenizer(config: RunConfig, folder: AnyPath, digest: str) -> Tokenizer:
    """What the run was trained with, which the digest in its checkpoints proves."""
    options, path = config.data.tokenizer, folder

    def read_text() -> Tokenizer:
        nonlocal path
        if options.kind == "bytes":
            return BytesTokenizer()
        if (folder / HUGGINGFACE_FOLDER / TOKENIZER_FILE).is_file():
            path = folder / HUGGINGFACE_FOLDER
            return load_huggingface_tokenizer(path)
        path = find_sentencepiece(folder, options.model_file)
        return load_sentencepiece(path)

    tokenizer = data_tokenizer(config.data, read_text)
    if tokenizer.digest() == digest:
        return tokenizer
    if isinstance(tokenizer, SymbolTokenizer):
        raise UserError(
            f"{folder} was trained with other symbols of the task {config.data.reasoning.task!r} "
            "than this version of the library has; use the version that wrote it."
        )
    raise UserError(
        f"{path} is not the tokenizer that the run was trained with; put the original file back."
    )


def find_sentencepiece(folder: AnyPath, model_file: str | None) -> AnyPath:
    """The tokenizer's model of the run in `folder`; `model_file` is as in its config.

    Raises:
      UserError: if there is none.
    """
    own = folder / SENTENCEPIECE_FILE
    if own.is_file():
        return own
    if model_file is None:
        raise UserError(
            f"{own} does not exist; without it the run's tokens have no meaning. Copy it from "
            "where the run was trained."
        )
    given = as_path("data.tokenizer.model_file", model_file)
    if not given.is_file():
        raise UserError(
            f"the run's tokenizer, data.tokenizer.model_file={model_file}, does not exist; copy it "
            f"to {own}."
        )
    return given
