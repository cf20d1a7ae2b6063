"""Checkpoint folders of other projects: config.json and weights, recognised, read and written.

`FORMATS` names the known formats. Each is a class in its own module; what all of them share is
in `foreign.py` (configs) and `tensor_map.py` (tensors).
"""

import contextlib
import dataclasses
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from absl import logging

from megatransformer_jax.checkpoints.foreign import Format, config_to, dropped_options
from megatransformer_jax.checkpoints.gpt2 import Gpt2
from megatransformer_jax.checkpoints.huginn import Huginn
from megatransformer_jax.checkpoints.llama import Llama
from megatransformer_jax.checkpoints.llama_relatives import Olmo2, Qwen2, Qwen3
from megatransformer_jax.checkpoints.ouro import Ouro
from megatransformer_jax.checkpoints.parcae import Parcae
from megatransformer_jax.checkpoints.safetensors_files import (
    INDEX_FILE,
    SafetensorsReader,
    write_json,
    write_safetensors,
)
from megatransformer_jax.checkpoints.tensor_map import (
    FormatError,
    Place,
    Prefixed,
    iterate_tensors,
    params_from_tensors,
    tensor_shapes,
)
from megatransformer_jax.config.build import read_values
from megatransformer_jax.config.loop import FOREIGN_FORMATS
from megatransformer_jax.config.model import ModelConfig
from megatransformer_jax.config.option import ConfigError, UserError, nearest_hint

# All that there are, as `FOREIGN_FORMATS` names them (config/loop.py).
FORMATS: tuple[Format, ...] = (
    Huginn(),
    Gpt2(),
    Llama(),
    Qwen2(),
    Qwen3(),
    Olmo2(),
    Ouro(),
    Parcae(),
)

CONFIG_FILE = "config.json"
# Special ids; Huginn's config class does not accept them in config.json.
GENERATION_FILE = "generation_config.json"
GIBIBYTE = 2**30
DEFAULT_SHARD_BYTES = 5 * GIBIBYTE

# What the weights may be stored as: the format's name to NumPy's. All fit into float32 exactly.
_FLOAT_TYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
WEIGHT_TYPES = tuple(_FLOAT_TYPES.values())

# What an older export in the same place may consist of.
_OWN_FILES = (
    CONFIG_FILE,
    GENERATION_FILE,
    INDEX_FILE,
    "*.safetensors",
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)

ParamDtype = Literal["float32", "stored"]


# ------------------------------------------------------------------------------
# Which format.


def format_named(name: str) -> Format:
    """The format of this name.

    Raises:
      ConfigError: for another one, listing those there are.
    """
    for format in FORMATS:
        if format.name == name:
            return format
    hint = nearest_hint(name, FOREIGN_FORMATS) if isinstance(name, str) else ""
    raise ConfigError("format", f"{name!r} is unknown; {hint}known: {', '.join(FOREIGN_FORMATS)}.")


def format_of(values: Mapping[str, Any], where: str) -> Format | None:
    """The format that a config.json is of.

    Args:
      values: what is in the file.
      where: the file, for messages.

    Returns:
      The format, or None for a file that names no architecture, such as that of a run of ours.

    Raises:
      FormatError: if it names an architecture that is not known, listing the known ones.
    """
    for format in FORMATS:
        if format.recognises(values):
            return format
    for key in ("model_type", "architectures", "_class_name"):
        if values.get(key):
            known = ", ".join(format.title for format in FORMATS)
            raise FormatError(
                f"{where}: {key} is {values[key]!r}, an architecture that cannot be read; the "
                f"known ones are {known}."
            )
    return None


# ------------------------------------------------------------------------------
# Reading.


@dataclasses.dataclass(frozen=True)
class ForeignCheckpoint:
    """A folder whose config.json has been read and whose weights have not.

    Attributes:
      folder: where it is.
      format: what it is of.
      config: the architecture.
      tensors: the weights, each read from disk when it is asked for.
    """

    folder: pathlib.Path
    format: Format
    config: ModelConfig
    tensors: Mapping[str, np.ndarray]

    def params(
        self,
        *,
        param_dtype: ParamDtype = "float32",
        place: Place = lambda path, tensor: np.ascontiguousarray(tensor),
    ) -> dict[str, Any]:
        """Reads the parameters, tensor by tensor.

        Args:
          param_dtype: 'float32', the type of parameters in this package: 16-bit weights are
            converted, which is exact, and the log says so. 'stored': every parameter keeps the type
            it has in the file, which takes half the memory for bfloat16.
          place: puts a parameter, given its path and value, where it is to be, such as on a device.
            With the default they stay NumPy arrays.

        Returns:
          The tree of `init_params`.

        Raises:
          WeightsFileError: for damaged files.
          FormatError: for missing, unknown or contradictory tensors.
        """
        links = self.format.links(self.config)
        types = {
            name: _type_name(self.tensors, name)
            for name in tensor_shapes(links)
            if name in self.tensors
        }
        _check_types(types, self.folder)
        if param_dtype == "float32":
            _log_conversion(types, self.folder)

        def convert_and_place(path: str, tensor: np.ndarray) -> Any:
            if param_dtype == "float32":
                tensor = np.asarray(tensor, np.float32)
            return place(path, tensor)

        extras = self.format.extras(self.config, self.tensors)
        try:
            return params_from_tensors(self.tensors, links, extras, convert_and_place)
        except FormatError as error:
            raise FormatError(f"{self.folder}: {error}") from error


def open_folder(folder: str | os.PathLike[str]) -> ForeignCheckpoint:
    """Reads config.json and the names of the weights: model.safetensors, or shards with an index.

    Raises:
      WeightsFileError: missing, damaged or contradictory files.
      FormatError: an unknown architecture, missing config keys, unsupported values.
    """
    folder = pathlib.Path(folder)
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise FormatError(f"{path} does not exist; name a folder that has it next to the weights.")
    values = read_values(path)
    format = format_of(values, str(path))
    if format is None:
        raise FormatError(
            f"{path}: names no architecture (model_type); copy the file that came with the weights."
        )
    config = format.read_config(values, str(path))
    tensors = format.open_tensors(folder)
    layers = config.prelude_layers + config.core_layers + config.coda_layers
    if layers > len(tensors):  # Else a wrong number would take all of the memory.
        raise FormatError(
            f"{path}: asks for {layers} layers, but the weights have only {len(tensors)} tensors; "
            "correct the number of layers there, or use the weights of the same model."
        )
    return ForeignCheckpoint(folder, format, config, tensors)


def load_folder(
    folder: str | os.PathLike[str],
    *,
    param_dtype: ParamDtype = "float32",
    place: Place = lambda path, tensor: np.ascontiguousarray(tensor),
) -> tuple[ModelConfig, dict[str, Any]]:
    """The architecture and the parameters; see `open_folder` and `ForeignCheckpoint.params`."""
    checkpoint = open_folder(folder)
    return checkpoint.config, checkpoint.params(param_dtype=param_dtype, place=place)


def _check_types(types: Mapping[str, str], folder: pathlib.Path) -> None:
    for name, type_name in types.items():
        if type_name not in _FLOAT_TYPES:
            raise FormatError(
                f"{folder}: tensor {name!r} is of type {type_name}; weights must be one of "
                f"{', '.join(_FLOAT_TYPES)}. Get weights that are not quantised."
            )


def _type_name(tensors: Mapping[str, np.ndarray], name: str) -> str:
    if isinstance(tensors, (SafetensorsReader, Prefixed)):
        return tensors.type_name(name)
    types = {numpy_name: short for short, numpy_name in _FLOAT_TYPES.items()}
    found = tensors[name].dtype.name
    return types.get(found, found)


def _log_conversion(types: Mapping[str, str], folder: pathlib.Path) -> None:
    stored = [_FLOAT_TYPES[type_name] for type_name in types.values()]
    for short in sorted(set(stored) - {"float32"}):
        logging.info(
            "%s: %d of %d tensors are stored as %s and converted to float32, which is exact",
            folder,
            stored.count(short),
            len(stored),
            short,
        )


# ------------------------------------------------------------------------------
# Writing.


@dataclasses.dataclass(frozen=True)
class FolderTokenizer:
    """What a folder says of the tokenizer.

    Attributes:
      special_ids: such as {'bos_token_id': 1, 'eos_token_id': 2}, for generation_config.json.
      files: contents by name, such as {'tokenizer.model': ...}.
    """

    special_ids: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    files: Mapping[str, bytes] = dataclasses.field(default_factory=dict)


def save_folder(
    folder: str | os.PathLike[str],
    format: Format,
    config: ModelConfig,
    params: Mapping[str, Any],
    *,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    dtype: str | None = None,
    tokenizer: FolderTokenizer | None = None,
    overwrite: bool = False,
) -> None:
    """Writes a checkpoint folder, which appears as a whole or not at all.

    Args:
      folder: is made; may be there if it is empty.
      format: what it is to be of.
      config: the architecture. What of it tells only how it was trained (dropout, distribution of
        depths) has no place in the format; the log lists it.
      params: the parameters, in the tree of `init_params`.
      max_shard_bytes: weights that take more are split into files of at most this size, but for
        single tensors that are larger.
      dtype: type to store all weights as, one of `WEIGHT_TYPES`; a shorter one than they have
        rounds them. None: each keeps its own.
      tokenizer: goes along.
      overwrite: replaces an older export. Other files than an export's are never deleted.

    Raises:
      FormatError: if the format cannot express the model, listing all reasons.
      UserError: if the folder is in use, or the type or the size of shards cannot be.
    """
    folder = pathlib.Path(folder).absolute()
    values = _expressed(format, config)
    if max_shard_bytes < 1:
        raise UserError(f"max_shard_bytes is {max_shard_bytes}; it must be at least 1.")
    if dtype is not None and dtype not in WEIGHT_TYPES:
        raise UserError(f"dtype is {dtype!r}; known: {', '.join(WEIGHT_TYPES)}.")
    check_output_folder(folder, overwrite=overwrite)
    types: set[str] = set()

    def tensors() -> Iterator[tuple[str, np.ndarray]]:
        for name, tensor in iterate_tensors(params, format.links(config)):
            tensor = tensor if dtype is None else _cast(tensor, dtype, name)
            types.add(tensor.dtype.name)
            yield name, tensor
        yield from format.buffers(config)

    with _new_folder(folder) as unfinished:
        write_safetensors(unfinished, tensors(), max_shard_bytes)
        if format.names_dtype:
            # It says here in which type the model is to be made.
            values["torch_dtype"] = types.pop() if len(types) == 1 else "float32"
        write_json(unfinished / CONFIG_FILE, values)
        if tokenizer is not None and tokenizer.special_ids:
            write_json(unfinished / GENERATION_FILE, tokenizer.special_ids)
        for name, content in ({} if tokenizer is None else tokenizer.files).items():
            (unfinished / name).write_bytes(content)
    if dropped := dropped_options(format, config):
        logging.info(
            "%s's config.json has no place for %s; left out", format.title, ", ".join(dropped)
        )


def _expressed(format: Format, config: ModelConfig) -> dict[str, Any]:
    """`config_to`, whose error also names the formats that can express the model."""
    try:
        return config_to(format, config)
    except FormatError as error:
        others = [other.name for other in FORMATS if _can_express(other, config)]
        hint = f"Formats that can express it: {', '.join(others)}." if others else "No format can."
        raise FormatError(f"{error} {hint}") from error


def _can_express(format: Format, config: ModelConfig) -> bool:
    try:
        config_to(format, config)
    except FormatError:
        return False
    return True


def check_output_folder(folder: pathlib.Path, *, overwrite: bool) -> None:
    """Checks that an export may be written there, before anything takes time.

    Raises:
      UserError: if it is a file, holds something, or its parent does not exist.
    """
    if not folder.parent.is_dir():
        raise UserError(f"folder {folder.parent} does not exist; make it first.")
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file; name a new folder.")
    files = sorted(folder.iterdir()) if folder.is_dir() else []
    if files and not overwrite:
        raise UserError(
            f"{folder} is not empty (it has {files[0].name}); name a new folder, or have an older "
            "export replaced with overwrite."
        )
    foreign = [file.name for file in files if not any(map(file.match, _OWN_FILES))]
    if foreign:
        raise UserError(
            f"{folder} has {foreign[0]!r}, which is not part of an export, so it is not "
            "overwritten; name a new folder."
        )


def _cast(tensor: np.ndarray, dtype: str, name: str) -> np.ndarray:
    with np.errstate(over="ignore"):
        cast = tensor.astype(jnp.dtype(dtype))
    if not np.array_equal(np.isfinite(cast), np.isfinite(tensor)):
        raise UserError(
            f"tensor {name!r} has values up to {np.abs(tensor).max():g}, which {dtype} cannot "
            "hold; store it as float32 or bfloat16."
        )
    return cast


@contextlib.contextmanager
def _new_folder(folder: pathlib.Path) -> Iterator[pathlib.Path]:
    """A folder next to the wanted one, which takes its name at the end unless an error came."""
    unfinished = pathlib.Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        yield unfinished
        for file in unfinished.iterdir():
            with file.open("rb") as opened:
                os.fsync(opened.fileno())
        unfinished.chmod(0o755)  # A temporary folder is private to its maker.
        if folder.exists() and any(folder.iterdir()):
            old = pathlib.Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
            folder.rename(old)
            unfinished.rename(folder)
            shutil.rmtree(old)
        else:
            unfinished.rename(folder)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
