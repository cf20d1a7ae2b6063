"""Reads an experiment: a Python file with `get_config`, or a YAML or JSON file of values."""

import importlib.util
import inspect
import os
import pathlib
import re
import sys
import traceback
from collections.abc import Sequence
from typing import Any

from megatransformer_jax.config.build import check_values, plain
from megatransformer_jax.config.option import ConfigError, UserError
from megatransformer_jax.config.value_files import read_text, read_values

_REFERENCE = re.compile(r"(?P<path>.+?\.(py|yaml|yml|json))(:(?P<argument>.*))?", re.DOTALL)


def read_experiment(reference: str) -> dict[str, Any]:
    """The nested values of `path/to/file.py`, `file.py:argument`, `file.yaml` or `file.json`.

    Only names and types are checked; the values may be a part of a configuration.

    Raises:
      UserError: if the file is missing or faulty, or a name or a type in it is wrong.
    """
    match = _REFERENCE.fullmatch(reference)
    if match is None:
        raise UserError(
            f"--config={reference}: not a config file; its name must end in .py, .yaml, .yml or "
            ".json (a .py file may be followed by ':argument')."
        )
    path, argument = pathlib.Path(match["path"]), match["argument"]
    if path.suffix == ".py":
        values = plain(_run_get_config(path, argument))
    elif argument is not None:
        raise UserError(
            f"--config={reference}: only .py files take an argument; remove ':{argument}'."
        )
    else:
        values = plain(read_values(path))
    if not isinstance(values, dict):
        raise UserError(
            f"{path}: get_config returned {type(values).__name__}; it must be a ConfigDict or dict."
        )
    try:
        check_values(values)
    except ConfigError as error:
        raise UserError(f"{path}: {error}") from error
    return values


def parse_variants(argument: str, known: Sequence[str]) -> set[str]:
    """The variants in the argument of a `get_config`, such as 'tiny,diagonal'.

    Raises:
      UserError: if one is not known; lists those that are.
    """
    variants = {word.strip() for word in argument.split(",") if word.strip()}
    unknown = sorted(variants - set(known))
    if unknown:
        raise UserError(
            f"unknown variant {unknown[0]!r}; known: {', '.join(known)} "
            "(separate several by commas)."
        )
    return variants


def _run_get_config(path: pathlib.Path, argument: str | None) -> Any:
    source = read_text(path)
    spec = importlib.util.spec_from_loader(f"experiment_{path.stem}", loader=None)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    module.__file__ = str(path)
    try:
        exec(compile(source, str(path), "exec"), vars(module))
        get_config = getattr(module, "get_config", None)
        if get_config is None:
            raise UserError("has no get_config; define get_config(arg='') -> ConfigDict.")
        if argument is None:
            return get_config()
        if not inspect.signature(get_config).parameters:
            raise UserError(f"get_config takes no argument; remove ':{argument}'.")
        return get_config(argument)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except Exception as error:
        line = _last_line_in(path, error)
        raise UserError(f"{path}:{line}: {type(error).__name__}: {error}") from error


def _last_line_in(path: pathlib.Path, error: Exception) -> int:
    """Line of `path` that an error came from."""
    if isinstance(error, SyntaxError) and error.filename == os.fspath(path):
        return error.lineno or 0
    frames = traceback.extract_tb(sys.exc_info()[2])
    lines = [frame.lineno for frame in frames if frame.filename == os.fspath(path)]
    return (lines[-1] if lines else 0) or 0
