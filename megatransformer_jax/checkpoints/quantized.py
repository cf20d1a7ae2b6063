"""Folders of quantised models: `quantization.json` next to safetensors.

A float parameter is stored under its path, such as `core/layers/layer_0/attention_norm_in/scale`. A
quantised matrix is stored in parts, below its path: `values`, `scale` and, by AWQ, `input_scale`.
`quantization.json` says how each is to be read, how the model was quantised, from what, and what
the run was that trained it.
"""

import dataclasses
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from megatransformer_jax.checkpoints.safetensors_files import (
    SafetensorsReader,
    WeightsFileError,
    shortened,
    write_safetensors,
)
from megatransformer_jax.config.build import construct, plain, read_values, to_dict
from megatransformer_jax.config.option import ConfigError, UserError
from megatransformer_jax.config.quantization import QuantizationConfig
from megatransformer_jax.nn.quantized import QuantizedMatrix, is_quantized_matrix, matrix_sides
from megatransformer_jax.storage import AnyPath, write_json

QUANTIZATION_FILE = "quantization.json"
_VERSION = 1
_MAX_SHARD_BYTES = 5 * 2**30
# Fields of a matrix that are not arrays.
_STATIC = ("shape", "num_inputs", "bits", "group", "rounds_inputs")


@dataclasses.dataclass(frozen=True)
class QuantizedFolder:
    """What a folder says about its model.

    Attributes:
      config: how it was quantised.
      source: what was quantised, for people.
      run: nested values of a run's configuration; the model's architecture is in it.
      is_of_run: whether that run trained the model; otherwise it only describes it.
      vocabulary: digest of the tokenizer. None: the model has none.
      report: rows of the report by depth. Empty: nobody measured.
    """

    config: QuantizationConfig
    source: str
    run: dict[str, Any]
    is_of_run: bool
    vocabulary: str | None
    report: list[dict[str, Any]]


def is_quantized_folder(folder: AnyPath) -> bool:
    """Whether `write_quantized` has written the folder."""
    return (folder / QUANTIZATION_FILE).is_file()


def refuse_quantized(folder: AnyPath) -> None:
    """Checks that the folder is not a quantised model, for what needs the weights as trained.

    Raises:
      UserError: if it is one; names what it was made from.
    """
    if is_quantized_folder(folder):
        source = read_values(folder / QUANTIZATION_FILE).get("source")
        raise UserError(
            f"{folder} is a quantised model. It can be evaluated, used to generate and exported "
            "as programs, but not trained, averaged, diagnosed or written in a format of another "
            f"project; name what it was made from: {source}."
        )


def write_quantized(folder: pathlib.Path, params: Any, about: QuantizedFolder) -> None:
    """Writes a model into an existing folder.

    Args:
      folder: where to.
      params: nested dicts of arrays and quantised matrices.
      about: what else is to be known.
    """
    flat = flatten_dict(params, sep="/")
    matrices = {
        path: {name: getattr(leaf, name) for name in _STATIC}
        for path, leaf in flat.items()
        if is_quantized_matrix(leaf)
    }
    write_safetensors(folder, _tensors(flat), _MAX_SHARD_BYTES)
    values = {
        "version": _VERSION,
        "source": about.source,
        "quantization": to_dict(about.config),
        "matrices": matrices,
        "report": about.report,
        "vocabulary": about.vocabulary,
        "is_of_run": about.is_of_run,
        "run": about.run,
    }
    # Last, because it makes the folder one that can be read.
    write_json(folder / QUANTIZATION_FILE, values)


def read_about(folder: pathlib.Path) -> QuantizedFolder:
    """What `quantization.json` says, without the matrices.

    Raises:
      UserError: if it is damaged, or of another version of the library.
    """
    values = _values(folder)
    try:
        config: QuantizationConfig = construct(QuantizationConfig, plain(values["quantization"]))
        return QuantizedFolder(
            config=config,
            source=values["source"],
            run=values["run"],
            is_of_run=values["is_of_run"],
            vocabulary=values["vocabulary"],
            report=values["report"],
        )
    except (KeyError, TypeError, ConfigError) as error:
        raise _damaged(folder, f"lacks or contradicts {error}") from error


def read_quantized(folder: pathlib.Path, shapes: Mapping[str, tuple[int, ...]]) -> Any:
    """The parameters, on the first local device.

    Args:
      folder: of the model.
      shapes: of the model's float parameters, by path.

    Raises:
      UserError: if a tensor is missing, unknown, or of another shape than the model's.
    """
    reader, device = SafetensorsReader(folder), jax.local_devices()[0]
    matrices: dict[str, Any] = _values(folder)["matrices"]
    wanted = dict(_expected(folder, shapes, matrices))
    optional = {f"{path}/input_scale" for path in matrices}
    absent = [name for name in wanted if name not in reader and name not in optional]
    unknown = [name for name in reader if name not in wanted]
    for problem, names in (("lacks the tensors", absent), ("has unknown tensors", unknown)):
        if names:
            raise WeightsFileError(
                f"{folder} {problem} {shortened(names)}; quantise the model again."
            )

    def place(name: str) -> jax.Array:
        if reader.shape(name) != wanted[name]:
            raise WeightsFileError(
                f"{folder}: tensor {name!r} has shape {reader.shape(name)}, and the model needs "
                f"{wanted[name]}; quantise the model again."
            )
        return jax.device_put(reader[name], device)

    params: dict[str, Any] = {}
    for path in shapes:
        if path not in matrices:
            params[path] = place(path)
            continue
        static = matrices[path] | {"shape": tuple(matrices[path]["shape"])}
        has_factors = f"{path}/input_scale" in reader
        factors = place(f"{path}/input_scale") if has_factors else None
        params[path] = QuantizedMatrix(
            place(f"{path}/values"), place(f"{path}/scale"), factors, **static
        )
    return unflatten_dict(params, sep="/")


def _tensors(flat: Mapping[str, Any]) -> Iterator[tuple[str, np.ndarray]]:
    for path, leaf in flat.items():
        if not is_quantized_matrix(leaf):
            yield path, np.asarray(leaf)
            continue
        for name in ("values", "scale", "input_scale"):
            if getattr(leaf, name) is not None:
                yield f"{path}/{name}", np.asarray(getattr(leaf, name))


def _expected(
    folder: pathlib.Path, shapes: Mapping[str, tuple[int, ...]], matrices: Mapping[str, Any]
) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of the tensors."""
    for path, about in matrices.items():
        if path not in shapes or tuple(about["shape"]) != tuple(shapes[path]):
            needed = shapes.get(path, "no such parameter")
            raise _damaged(folder, f"has {path} as {about['shape']}; the model has {needed}")
    for path, shape in shapes.items():
        if path not in matrices:
            yield path, tuple(shape)
            continue
        about = matrices[path]
        inputs, outputs = matrix_sides(tuple(shape), about["num_inputs"])
        stored = inputs if about["bits"] == 8 else -(-inputs // 2)
        yield f"{path}/values", (stored, outputs)
        yield f"{path}/scale", (-(-inputs // about["group"]), outputs)
        yield f"{path}/input_scale", (inputs,)


def _values(folder: pathlib.Path) -> dict[str, Any]:
    values = read_values(folder / QUANTIZATION_FILE)
    if values.get("version") != _VERSION:
        raise _damaged(folder, f"is of version {values.get('version')!r} and not {_VERSION}")
    return values


def _damaged(folder: pathlib.Path, problem: str) -> UserError:
    return UserError(
        f"{folder / QUANTIZATION_FILE} {problem}, so this version of the library cannot read it; "
        "quantise the model again."
    )
