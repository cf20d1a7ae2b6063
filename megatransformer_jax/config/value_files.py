"""Reads nested values from YAML and JSON files, strictly."""

import json
import pathlib
import re
from collections.abc import Hashable
from typing import Any

import yaml

from megatransformer_jax.config.option import UserError


def read_values(path: pathlib.Path) -> dict[str, Any]:
    """The nested values of a `.json`, `.yaml` or `.yml` file.

    Raises:
      UserError: if the file is missing, malformed, repeats a key, or holds no mapping.
    """
    text = read_text(path)
    try:
        values = (
            json.loads(text, object_pairs_hook=_unique_keys)
            if path.suffix == ".json"
            else yaml.load(text, _StrictLoader)
        )
    except (json.JSONDecodeError, yaml.YAMLError, _RepeatedKeyError) as error:
        raise UserError(f"{path}: not valid {path.suffix[1:].upper()}: {error}") from error
    if not isinstance(values, dict):
        raise UserError(
            f"{path}: holds {type(values).__name__}; it must map option names to values, "
            "such as 'preset: tiny'."
        )
    return values


def read_text(path: pathlib.Path) -> str:
    """The text of a configuration file.

    Raises:
      UserError: if there is no such file or it is not UTF-8 text; names its neighbours.
    """
    try:
        return path.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        raise UserError(f"{path}: no such config file. {_neighbours(path.parent)}") from None
    except (UnicodeDecodeError, PermissionError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from error


def _neighbours(folder: pathlib.Path) -> str:
    if not folder.is_dir():
        return f"There is no folder {folder} either; paths count from {pathlib.Path.cwd()}."
    suffixes = {".py", ".yaml", ".yml", ".json"}
    names = sorted(file.name for file in folder.iterdir() if file.suffix in suffixes)
    names = [name for name in names if not name.startswith(("__", "."))]
    return f"{folder} has: {', '.join(names) or 'no config files'}."


class _RepeatedKeyError(ValueError):
    """A mapping names a key twice, of which all but the last would be lost."""


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        keys = [key for key, _ in pairs]
        repeated = next(key for key in keys if keys.count(key) > 1)
        raise _RepeatedKeyError(f"key {repeated!r} appears twice; keep one.")
    return values


class _StrictLoader(yaml.SafeLoader):
    """YAML without repeated keys, and with 1e-3 as a number (YAML 1.1 reads it as a string)."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise _RepeatedKeyError(f"key {key!r} appears twice; keep one.\n{node.start_mark}")
        return super().construct_mapping(node, deep)


_StrictLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)
