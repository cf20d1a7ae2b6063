"""What a checkpoint format of another project is: its config.json and its tensors, both ways.

A format is a subclass of `Format` in its own module, named in `checkpoints/folders.py`. It
translates config.json in both directions and declares its tensors as links (`tensor_map.py`); what
it cannot express, and what to say then, follows from these.
"""

import abc
import dataclasses
import pathlib
import types
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from megatransformer_jax.checkpoints.compatibility import (
    SAME_UP_TO_ROUNDING,
    TRAINING_ONLY,
    flatten_config,
)
from megatransformer_jax.checkpoints.safetensors_files import SafetensorsReader
from megatransformer_jax.checkpoints.tensor_map import Check, FormatError, Link, Prefixed
from megatransformer_jax.config.build import to_dict
from megatransformer_jax.config.layers import ValueEmbeddingConfig
from megatransformer_jax.config.model import ModelConfig
from megatransformer_jax.config.option import ConfigError
from megatransformer_jax.config.recurrence import ExitGateConfig, RecurrenceConfig

# A type that a value may have; several as in isinstance. A float may be written as a whole number.
Kind = type | tuple[type, ...]


class Format(abc.ABC):
    """A checkpoint format of another project."""

    # What `save`, `export` and the documentation call it.
    name: ClassVar[str]
    # For messages: "cannot be written as a Llama".
    title: ClassVar[str]
    # transformers leaves it out of all names where it saved the model without its head.
    base_prefix: ClassVar[str] = ""

    # Whether config.json names the type of the weights, as `torch_dtype`.
    names_dtype: ClassVar[bool] = True
    # Whether it can express `model.value_embedding`.
    has_value_embeddings: ClassVar[bool] = False

    @abc.abstractmethod
    def recognises(self, values: Mapping[str, Any]) -> bool:
        """Whether these values of a config.json are of this format, right or wrong."""

    @abc.abstractmethod
    def read_config(self, values: Mapping[str, Any], where: str = "config.json") -> ModelConfig:
        """Translates config.json.

        Args:
          values: what is in the file.
          where: the file, for messages.

        Raises:
          FormatError: for missing keys, values of a wrong type or that cannot be, and values whose
            computation this package does not have.
        """

    @abc.abstractmethod
    def write_config(self, config: ModelConfig) -> dict[str, Any]:
        """The values of config.json as if the model were of this format; what else it is, is left
        out. `config_to` checks what that loses.
        """

    @abc.abstractmethod
    def links(self, config: ModelConfig) -> list[Link]:
        """All tensors of the format and where they are in the tree of `init_params`."""

    def extras(self, config: ModelConfig, tensors: Mapping[str, np.ndarray]) -> Mapping[str, Check]:
        """Tensors that may be in a file besides, each with a check of its value."""
        del config, tensors
        return {}

    def buffers(self, config: ModelConfig) -> Iterator[tuple[str, np.ndarray]]:
        """Tensors that follow from the config and are written because readers want them."""
        del config
        return iter(())

    def comparable(self, config: ModelConfig) -> tuple[ModelConfig, list[str]]:
        """The model as the format would name it, and lines about what that changes.

        Where a model of ours has several names (layers in prelude or coda of a plain model), this
        gives the one that `read_config` gives.
        """
        return config, []

    def decisive_options(self, config: ModelConfig) -> set[str]:
        """Options of training alone that decide what a model of this config computes."""
        del config
        return set()

    def open_tensors(self, folder: pathlib.Path) -> Mapping[str, np.ndarray]:
        """The tensors of a folder, each read when it is asked for."""
        tensors = SafetensorsReader(folder)
        prefix = self.base_prefix
        if prefix and not any(name.startswith(prefix) for name in tensors):
            return Prefixed(tensors, prefix)
        return tensors


# ------------------------------------------------------------------------------
# What a format can express.


def config_to(format: Format, config: ModelConfig) -> dict[str, Any]:
    """The config.json of a model, which `format.read_config` reads as the same computation.

    Options of training alone have no place in it; `dropped_options` names them.

    Raises:
      FormatError: listing every option that the format cannot express.
    """
    lines = []
    if config.value_embedding.layers and not format.has_value_embeddings:
        # First, because they are of layers by number, and `comparable` may change the numbers.
        layers = list(config.value_embedding.layers)
        lines.append(f"model.value_embedding.layers: {layers!r}, {format.title}'s is []")
        config = dataclasses.replace(config, value_embedding=ValueEmbeddingConfig())
    values: dict[str, Any] = {}
    try:
        comparable, others = format.comparable(config)
        values = format.write_config(comparable)
    except ConfigError as error:  # An option goes with layers that the format does not have.
        lines.append(f"model.{error}")
    else:
        lines += others + _differences(format, comparable, values)
    if lines:
        raise FormatError(
            f"this model cannot be written as {_with_article(format.title)}, whose architecture is "
            "another:\n"
            + "\n".join(f"  {line}" for line in lines)
            + "\nOnly a model trained with these values can be exported."
        )
    return values


def _with_article(title: str) -> str:
    return f"{'an' if title[0] in 'AEIOU' else 'a'} {title}"


def dropped_options(format: Format, config: ModelConfig) -> list[str]:
    """Options, as 'model.name=value', that config.json has no place for.

    They tell how the model was trained or how it is computed, but not what it computes.
    """
    config, _ = format.comparable(config)
    ours = _flat(config)
    theirs = _flat(format.read_config(config_to(format, config)))
    return [f"{path}={ours[path]!r}" for path in ours if ours[path] != theirs[path]]


def _differences(format: Format, config: ModelConfig, values: Mapping[str, Any]) -> list[str]:
    """What would be computed otherwise if the model were read back from these values.

    Compared are whole configurations, so that an option which is new tomorrow is not overlooked.
    """
    try:
        theirs = _flat(format.read_config(values))
    except FormatError as error:  # Such as a width that the heads do not divide.
        cause = error.__cause__
        return [f"model.{cause}" if isinstance(cause, ConfigError) else str(error)]
    ours = _flat(config)
    free = {*TRAINING_ONLY, *SAME_UP_TO_ROUNDING} - format.decisive_options(config)
    return [
        f"{path}: {value!r}, {format.title}'s is {theirs[path]!r}"
        for path, value in ours.items()
        if value != theirs[path] and path not in free
    ]


def _flat(config: ModelConfig) -> dict[str, Any]:
    """Options by dotted path, None resolved where it stands for another option's value.

    Without images or sound, all of their options are at their defaults; with them, no format
    expresses a single one.
    """
    resolved = to_dict(config)
    resolved["attention"]["num_kv_heads"] = config.attention.kv_heads
    resolved["attention"]["head_dim"] = config.head_dim(config.width)
    resolved["recurrence"]["core_width"] = config.core_width
    if config.attention.qk_norm_eps is None:
        resolved["attention"]["qk_norm_eps"] = config.norm.eps
    for medium in ("image", "audio"):
        resolved[medium] = {"enabled": resolved[medium]["enabled"]}
    return flatten_config({"model": resolved})


def plain_comparable(title: str, config: ModelConfig) -> tuple[ModelConfig, list[str]]:
    """`Format.comparable` for plain causal models, whose layers are all in our prelude."""
    lines = []
    changes: dict[str, Any] = {}
    if config.is_recurrent:
        lines.append(f"model.core_layers: {config.core_layers}, {title} has no core")
        changes = {
            "core_layers": 0,
            "recurrence": RecurrenceConfig(),
            "exit_gate": ExitGateConfig(),
        }
    if config.sharing.scheme == "none":
        windows = config.windows("prelude") + config.windows("coda")
        changes["prelude_layers"] = max(1, config.prelude_layers + config.coda_layers)
        changes["coda_layers"] = 0
        changes["attention"] = dataclasses.replace(
            config.attention, core_windows=(), coda_windows=(), **canonical_windows(windows)
        )
    return dataclasses.replace(config, **changes), lines


def canonical_windows(windows: Sequence[int | None]) -> dict[str, Any]:
    """Options of attention for the windows of a plain model's layers; of two ways to say the same,
    the shorter."""
    if len(set(windows)) > 1:
        return {"window": None, "prelude_windows": tuple(window or 0 for window in windows)}
    return {"window": windows[0] if windows else None, "prelude_windows": ()}


def plain_layers(config: ModelConfig) -> list[str]:
    """Paths of the layers of a plain causal model, in their order."""
    return [
        f"{stack}/layer_{layer}"
        for stack, count in (("prelude", config.prelude_layers), ("coda", config.coda_layers))
        for layer in range(count)
    ]


def tied_head(tensors: Mapping[str, np.ndarray], embedding: str, key: str, fix: str) -> Check:
    """For `Format.extras`: a head must be the embedding.

    Args:
      tensors: of the checkpoint.
      embedding: name of the embedding among them.
      key: of config.json, which says that they are the same.
      fix: what to do if they are not.
    """

    def check(head: np.ndarray) -> str | None:
        if np.array_equal(head, tensors[embedding]):
            return None
        return f"is not equal to {embedding!r}, although {key} is true in config.json; {fix}"

    return check


# ------------------------------------------------------------------------------
# Reading config.json.


def check_fixed(
    values: Mapping[str, Any], fixed: Mapping[str, Any], where: str, supported: str
) -> None:
    """Checks values that have to be what this package computes; absent ones are.

    Args:
      values: of config.json.
      fixed: the values that are computed; they are the format's defaults.
      where: the file.
      supported: what can be read, such as 'only models like Huginn-0125 can be read'.

    Raises:
      FormatError: for another value.
    """
    for key, wanted in fixed.items():
        if values.get(key, wanted) != wanted:
            raise FormatError(
                f"{where}: {key} is {values[key]!r}, not {wanted!r}, so this model computes "
                f"something else; {supported}."
            )


def checked_values(
    values: Mapping[str, Any],
    required: Mapping[str, Kind],
    defaults: Mapping[str, tuple[Kind, Any]],
    where: str,
) -> dict[str, Any]:
    """The keys that a format reads, of the types that they must have.

    Args:
      values: of config.json.
      required: keys that must be there, and their types.
      defaults: of the other keys their types, and their values where they are absent or null.
      where: the file.

    Raises:
      FormatError: for missing keys, all of them, or a value of another type.
    """
    missing = [key for key in required if key not in values]
    if missing:
        raise FormatError(
            f"{where}: lacks {', '.join(missing)}; copy the file that came with the weights."
        )
    kinds: dict[str, Kind] = {**required, **{key: kind for key, (kind, _) in defaults.items()}}
    # A key with a default may be null, which stands for it.
    given = {key: values[key] for key in kinds if key in required or values.get(key) is not None}
    known = {key: given[key] if key in given else defaults[key][1] for key in kinds}
    for key, kind in kinds.items():
        if not is_a(known[key], kind):
            names = [one.__name__ for one in (kind if isinstance(kind, tuple) else (kind,))]
            wanted = " or ".join("null" if name == "NoneType" else name for name in names)
            raise FormatError(f"{where}: {key} is {known[key]!r}; it must be of type {wanted}.")
    return known


def is_a(value: Any, kind: Kind) -> bool:
    """Whether a value of config.json is of a type; True is not a number."""
    if isinstance(kind, tuple):
        return any(is_a(value, one) for one in kind)
    if isinstance(value, bool) or kind is types.NoneType:
        return type(value) is kind
    return isinstance(value, (int, float) if kind is float else kind)


def is_of_model_type(
    values: Mapping[str, Any], model_types: Sequence[str], architectures: Sequence[str]
) -> bool:
    """Whether config.json names one of these; model_type counts before architectures."""
    if "model_type" in values:
        return values["model_type"] in model_types
    named = values.get("architectures")
    return isinstance(named, list) and any(name in architectures for name in named)
