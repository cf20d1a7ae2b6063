"""Turns plain values into a checked `RunConfig`, and back.

This is the only way in for values from files and from the command line.
"""

import dataclasses
import json
import os
import pathlib
import tempfile
import typing
from collections.abc import Mapping
from typing import Any

import ml_collections

from megatransformer_jax.config.option import ConfigError, has_type, wrong_type
from megatransformer_jax.config.presets import load_preset
from megatransformer_jax.config.run import RunConfig
from megatransformer_jax.config.schema import unknown_key
from megatransformer_jax.config.value_files import read_values


def build(values: Mapping[str, Any] | ml_collections.ConfigDict) -> RunConfig:
    """The run that nested values describe.

    A `preset` among the values lies below the other values; what neither names has its default.
    Lists are taken for tuples and whole numbers for floats.

    Raises:
      ConfigError: for an unknown key, a wrong type, a value out of range or values that exclude
        each other; always with the full dotted path.
    """
    nested: dict[str, Any] = plain(values)
    check_values(nested)
    if nested.get("preset") is not None:
        nested = merge(load_preset(nested["preset"]), nested)
    return construct(RunConfig, nested)


def plain(values: Any) -> Any:
    """The same values with mappings (ConfigDict too) as dicts and lists as tuples."""
    if isinstance(values, ml_collections.ConfigDict):
        values = values.to_dict()
    if isinstance(values, Mapping):
        return {key: plain(value) for key, value in values.items()}
    if isinstance(values, (list, tuple)):
        return tuple(plain(value) for value in values)
    return values


def merge(under: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Nested values of `under`, replaced or completed by those of `over`."""
    merged = dict(under)
    for key, value in over.items():
        below = merged.get(key)
        if isinstance(value, Mapping) and isinstance(below, Mapping):
            value = merge(below, value)
        merged[key] = value
    return merged


def check_values(values: Mapping[str, Any], config_class: type = RunConfig, path: str = "") -> None:
    """Checks the names and the types of nested plain values; some may be absent.

    Raises:
      ConfigError: with the full dotted path of the key.
    """
    hints = typing.get_type_hints(config_class)
    names = [field.name for field in dataclasses.fields(config_class)]
    for key, value in values.items():
        key_path = f"{path}.{key}" if path else str(key)
        if key not in names:
            raise unknown_key(key_path, names)
        declared = hints[key]
        if dataclasses.is_dataclass(declared):
            if not isinstance(value, Mapping):
                raise ConfigError(
                    key_path,
                    f"{value!r} is no section; give its options by name, "
                    f"such as {dataclasses.fields(declared)[0].name!r}.",
                )
            check_values(value, typing.cast(type, declared), key_path)
        elif not has_type(value, declared):
            raise ConfigError(key_path, wrong_type(value, declared))


def construct(config_class: type, values: Mapping[str, Any], path: str = "") -> Any:
    """The configuration dataclass that nested values describe; their names must have been checked.

    Raises:
      ConfigError: with the full dotted path, below `path`.
    """
    hints = typing.get_type_hints(config_class)
    arguments = dict(values)
    for key, value in values.items():
        if dataclasses.is_dataclass(hints[key]):
            arguments[key] = construct(
                typing.cast(type, hints[key]), value, f"{path}.{key}" if path else key
            )
    try:
        return config_class(**arguments)
    except ConfigError as error:
        raise error.below(path) from None


def to_dict(config: Any) -> dict[str, Any]:
    """Nested values of a configuration, ready for JSON; `build` gives back an equal one."""
    return {
        field.name: _to_json(getattr(config, field.name)) for field in dataclasses.fields(config)
    }


def save_config(config: RunConfig, path: str | os.PathLike[str]) -> None:
    """Writes `config` as JSON. A reader sees the old file or the new one, never a part."""
    path = pathlib.Path(path)
    text = json.dumps(to_dict(config), indent=2, allow_nan=False) + "\n"
    with tempfile.NamedTemporaryFile(
        "w", dir=path.parent, prefix=f".{path.name}.", encoding="utf-8", delete=False
    ) as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.chmod(file.name, 0o644)  # The temporary file is private to its maker.
    os.replace(file.name, path)


def load_config(path: str | os.PathLike[str]) -> RunConfig:
    """The run whose configuration was saved at `path` (JSON or YAML).

    Raises:
      UserError: if the file is missing or cannot be read.
      ConfigError: if a value in it cannot be used.
    """
    return build(read_values(pathlib.Path(path)))


def _to_json(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return to_dict(value)
    return list(value) if isinstance(value, tuple) else value
