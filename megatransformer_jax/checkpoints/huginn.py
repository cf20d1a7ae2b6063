"""Folders of Huginn checkpoints: config.json and safetensors, read and written.

Source: seal-rg/recurrent-pretraining and tomg-group-umd/huginn-0125 (arXiv 2502.05171).
"""

import contextlib
import dataclasses
import os
import pathlib
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from absl import logging

from megatransformer_jax.checkpoints.huginn_config import (
    HuginnFormatError,
    config_from_huginn,
    config_to_huginn,
    dropped_options,
)
from megatransformer_jax.checkpoints.huginn_tensors import (
    ROTARY_TABLE,
    iterate_huginn,
    params_from_huginn,
    params_to_huginn,
    rotary_table,
)
from megatransformer_jax.checkpoints.safetensors_files import (
    INDEX_FILE,
    SafetensorsReader,
    write_json,
    write_safetensors,
)
from megatransformer_jax.config.build import read_values
from megatransformer_jax.config.model import ModelConfig
from megatransformer_jax.config.option import UserError

__all__ = [
    "HuginnFormatError",
    "config_from_huginn",
    "config_to_huginn",
    "load_huginn",
    "params_from_huginn",
    "params_to_huginn",
    "save_huginn",
]

CONFIG_FILE = "config.json"
# Special ids; upstream's config class does not accept them in config.json.
GENERATION_FILE = "generation_config.json"
GIBIBYTE = 2**30
DEFAULT_SHARD_BYTES = 5 * GIBIBYTE

# What the weights may be stored as: the format's name to NumPy's. All fit into float32 exactly.
_FLOAT_TYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
WEIGHT_TYPES = tuple(_FLOAT_TYPES.values())

# What an older export in the same place may consist of.
_OWN_FILES = (CONFIG_FILE, GENERATION_FILE, INDEX_FILE, "*.safetensors", "tokenizer.model")


def load_huginn(
    folder: str | os.PathLike[str],
    *,
    param_dtype: Literal["float32", "stored"] = "float32",
    place: Callable[[np.ndarray], Any] = np.ascontiguousarray,
) -> tuple[ModelConfig, dict[str, Any]]:
    """Reads a checkpoint folder, tensor by tensor.

    Args:
      folder: has config.json and the weights: model.safetensors, or shards with an index.
      param_dtype: 'float32', the type of parameters in this package: 16-bit weights are converted,
        which is exact, and the log says so. 'stored': every parameter keeps the type it has in the
        file, which takes half the memory for bfloat16.
      place: puts a parameter where it is to be, such as on a device. With the default they stay
        NumPy arrays.

    Returns:
      The architecture and the parameters, in the tree of `init_params`.

    Raises:
      WeightsFileError: missing, damaged or contradictory files.
      HuginnFormatError: missing or unknown tensors or config keys, unsupported values.
    """
    folder = pathlib.Path(folder)
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise HuginnFormatError(
            f"{path} does not exist; name a folder that has it next to the weights."
        )
    config = config_from_huginn(read_values(path), str(path))
    tensors = SafetensorsReader(folder)
    _check_types(tensors, folder)
    if param_dtype == "float32":
        _log_conversion(tensors, folder)

    def convert_and_place(tensor: np.ndarray) -> Any:
        return place(np.asarray(tensor, np.float32) if param_dtype == "float32" else tensor)

    try:
        return config, params_from_huginn(tensors, config, convert_and_place)
    except HuginnFormatError as error:
        raise HuginnFormatError(f"{folder}: {error}") from error


@dataclasses.dataclass(frozen=True)
class HuginnTokenizer:
    """What a folder says of the tokenizer.

    Attributes:
      special_ids: such as {'bos_token_id': 1, 'eos_token_id': 2}, for generation_config.json.
      model: content of a SentencePiece model, stored as tokenizer.model. None: there is no file.
    """

    special_ids: Mapping[str, int] | None = None
    model: bytes | None = None


def save_huginn(
    folder: str | os.PathLike[str],
    config: ModelConfig,
    params: Mapping[str, Any],
    *,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    dtype: str | None = None,
    with_rotary_table: bool = False,
    tokenizer: HuginnTokenizer | None = None,
    overwrite: bool = False,
) -> None:
    """Writes a checkpoint folder, which appears as a whole or not at all.

    Args:
      folder: is made; may be there if it is empty.
      config: the architecture. What of it tells only how it was trained (dropout, distribution of
        depths) has no place in the format; the log lists it.
      params: the parameters, in the tree of `init_params`.
      max_shard_bytes: weights that take more are split into files of at most this size, but for
        single tensors that are larger.
      dtype: type to store all weights as, one of `WEIGHT_TYPES`; a shorter one than they have
        rounds them. None: each keeps its own.
      with_rotary_table: also stores `freqs_cis`, the table of rotations, which follows from the
        config but which upstream's model class expects among the weights.
      tokenizer: goes along.
      overwrite: replaces an older export. Other files than an export's are never deleted.

    Raises:
      HuginnFormatError: if Huginn's architecture cannot express the model, listing all reasons.
      UserError: if the folder is in use, or the type or the size of shards cannot be.
    """
    folder = pathlib.Path(folder).absolute()
    values = config_to_huginn(config)
    if max_shard_bytes < 1:
        raise UserError(f"max_shard_bytes is {max_shard_bytes}; it must be at least 1.")
    if dtype is not None and dtype not in WEIGHT_TYPES:
        raise UserError(f"dtype is {dtype!r}; known: {', '.join(WEIGHT_TYPES)}.")
    check_output_folder(folder, overwrite=overwrite)
    types: set[str] = set()

    def tensors() -> Iterator[tuple[str, np.ndarray]]:
        for name, tensor in iterate_huginn(params, config):
            tensor = tensor if dtype is None else _cast(tensor, dtype, name)
            types.add(tensor.dtype.name)
            yield name, tensor
        if with_rotary_table:
            yield ROTARY_TABLE, rotary_table(config)

    with _new_folder(folder) as unfinished:
        write_safetensors(unfinished, tensors(), max_shard_bytes)
        # Upstream says here in which type the model is to be made.
        values["torch_dtype"] = types.pop() if len(types) == 1 else "float32"
        write_json(unfinished / CONFIG_FILE, values)
        if tokenizer is not None and tokenizer.special_ids:
            write_json(unfinished / GENERATION_FILE, tokenizer.special_ids)
        if tokenizer is not None and tokenizer.model is not None:
            (unfinished / "tokenizer.model").write_bytes(tokenizer.model)
    if dropped := dropped_options(config):
        logging.info("Huginn's config.json has no place for %s; left out", ", ".join(dropped))


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


def _check_types(tensors: SafetensorsReader, folder: pathlib.Path) -> None:
    for name in tensors:
        if tensors.type_name(name) not in _FLOAT_TYPES:
            raise HuginnFormatError(
                f"{folder}: tensor {name!r} is of type {tensors.type_name(name)}; weights must be "
                f"one of {', '.join(_FLOAT_TYPES)}. Get weights that are not quantised."
            )


def _log_conversion(tensors: SafetensorsReader, folder: pathlib.Path) -> None:
    stored = [_FLOAT_TYPES[tensors.type_name(name)] for name in tensors]
    for short in sorted(set(stored) - {"float32"}):
        logging.info(
            "%s: %d of %d tensors are stored as %s and converted to float32, which is exact",
            folder,
            stored.count(short),
            len(stored),
            short,
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
