"""Turns plain values into a checked configuration of a run, and back.

This is the only way in for values from files and from the command line. The rest of the module
reads the files that values come from: YAML and JSON, the presets of gin/, Python experiments.
"""

import collections
import dataclasses
import importlib.resources
import importlib.util
import inspect
import json
import os
import pathlib
import re
import sys
import tokenize
import traceback
import typing
from collections.abc import Hashable, Iterator, Mapping, Sequence
from importlib.resources.abc import Traversable
from typing import Any

import gin.config_parser
import ml_collections
import yaml

from megatransformer_jax.config.model import ModelConfig
from megatransformer_jax.config.optimizer import OptimizerConfig
from megatransformer_jax.config.option import (
    ConfigError,
    UserError,
    has_type,
    nearest_hint,
    options_of,
    sections_of,
    unknown_key,
    wrong_type,
)
from megatransformer_jax.config.run import RunConfig
from megatransformer_jax.config.run_base import BaseRunConfig
from megatransformer_jax.config.run_kinds import (
    AllOptions,
    own_values,
    require_transformer,
    run_class,
)
from megatransformer_jax.storage import AnyPath, as_path, write_json


def build(values: Mapping[str, Any] | ml_collections.ConfigDict) -> BaseRunConfig:
    """The run that nested values describe.

    A `preset` among the values lies below the other values; what neither names has its default.
    Lists are taken for tuples and whole numbers for floats.

    Raises:
      ConfigError: for an unknown key, a wrong type, a value out of range or values that exclude
        each other; always with the full dotted path.
    """
    nested = own_values(plain(values))
    if nested.get("preset") is not None:
        nested = merge(load_preset(nested["preset"]), nested)
    return construct(run_class(nested), nested)


def configure(reference: str | None, given: Mapping[str, Any]) -> BaseRunConfig:
    """The run that a reference and some values describe.

    What comes later wins: defaults, preset, experiment file, `given`.

    Args:
      reference: an experiment (see `read_experiment`) or the name of a preset. None: `given` must
        name a preset.
      given: nested values of options.

    Raises:
      UserError: if a value cannot be used, there is nothing to start from, or a preset is given
        that would be ignored.
    """
    if reference in preset_names():
        reference, given = None, merge({"preset": reference}, given)
    file_values = read_experiment(reference) if reference is not None else {}
    name = given.get("preset", file_values.get("preset"))
    if reference is None and name is None:
        raise ConfigError(
            "config",
            f"no experiment given; name one ({', '.join(experiment_names())}, or a file such as "
            "my/experiment.py), or a preset, whose other options are the defaults "
            f"({', '.join(preset_names())}).",
        )
    if name is not None and "preset" in given:
        preset_values = load_preset(name)
        if merge(preset_values, file_values) == file_values:
            raise ConfigError(
                "preset",
                f"{name!r} would be ignored, because {reference} itself sets all that the preset "
                "sets; leave the preset out, or use a file that leaves sizes to the preset.",
            )
    return build(merge(file_values, given))


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


def check_values(
    values: Mapping[str, Any], config_class: type = AllOptions, path: str = ""
) -> None:
    """Checks the names and the types of nested plain values of which some may be absent.

    It is for what is no whole configuration yet; `construct` needs no such check before it.

    Raises:
      ConfigError: with the full dotted path of the key.
    """
    for key_path, value, declared in _declared(values, config_class, path):
        if dataclasses.is_dataclass(declared):
            check_values(value, typing.cast(type, declared), key_path)
        elif not has_type(value, declared):
            raise ConfigError(key_path, wrong_type(value, declared))


def construct(config_class: type, values: Mapping[str, Any], path: str = "") -> Any:
    """The configuration dataclass that nested values describe.

    Raises:
      ConfigError: for an unknown name, a wrong type or a value that a check refuses, with the full
        dotted path, below `path`.
    """
    arguments = dict(values)
    for key_path, value, declared in _declared(values, config_class, path):
        if dataclasses.is_dataclass(declared):
            name = key_path.rpartition(".")[2]
            arguments[name] = construct(typing.cast(type, declared), value, key_path)
    try:
        return config_class(**arguments)
    except ConfigError as error:
        raise error.below(path) from None


def _declared(
    values: Mapping[str, Any], config_class: type, path: str
) -> Iterator[tuple[str, Any, Any]]:
    """Path, value and declared type of what is given directly below a path; all names are known,
    and sections are mappings."""
    hints = typing.get_type_hints(config_class)
    names = [field.name for field in dataclasses.fields(config_class)]
    for key, value in values.items():
        key_path = f"{path}.{key}" if path else str(key)
        if key not in names:
            raise unknown_key(key_path, names)
        if dataclasses.is_dataclass(hints[key]) and not isinstance(value, Mapping):
            raise ConfigError(
                key_path,
                f"{value!r} is not a section; give its options by name, "
                f"such as {dataclasses.fields(hints[key])[0].name!r}.",
            )
        yield key_path, value, hints[key]


def to_dict(config: Any) -> dict[str, Any]:
    """Nested values of a configuration, ready for JSON; `build` gives back an equal one."""
    return {
        field.name: _to_json(getattr(config, field.name)) for field in dataclasses.fields(config)
    }


def save_config(config: BaseRunConfig, path: str | os.PathLike[str]) -> None:
    """Writes `config` as JSON. A reader sees the old file or the new one, never a part."""
    write_json(path, to_dict(config))


def load_config(path: str | os.PathLike[str]) -> RunConfig:
    """The run of a transformer whose configuration was saved at `path` (JSON or YAML).

    Raises:
      UserError: if the file is missing or cannot be read.
      ConfigError: if a value in it cannot be used.
    """
    return require_transformer(build(read_values(as_path("path", path))))


def _to_json(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return to_dict(value)
    return list(value) if isinstance(value, tuple) else value


# ------------------------------------------------------------------------------
# Reads nested values from YAML and JSON files, strictly.


def read_values(path: AnyPath) -> dict[str, Any]:
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


def read_text(path: AnyPath) -> str:
    """The text of a configuration file.

    Raises:
      UserError: if there is no such file or it is not UTF-8 text; names its neighbours.
    """
    try:
        return path.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        raise UserError(f"{path}: no such config file. {_neighbours(path.parent)}") from None
    except (UnicodeDecodeError, OSError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from error


def json_object(line: str, where: str, form: str) -> dict[str, Any]:
    """The object that a line holds.

    Args:
      line: the text.
      where: file and line, for the error.
      form: says how a line should look, for the error.

    Raises:
      UserError: if the line is not JSON, or not an object.
    """
    try:
        record = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        raise UserError(f"{where}: not valid JSON ({error}); {form}") from error
    if not isinstance(record, dict):
        raise UserError(f"{where}: a JSON {type(record).__name__}, not an object; {form}")
    return record


def _neighbours(folder: AnyPath) -> str:
    if not folder.is_dir():
        return f"There is no folder {folder} either; paths are relative to {pathlib.Path.cwd()}."
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


# ------------------------------------------------------------------------------
# Named model sizes: gin/*.gin, parsed without gin's global registry.
#
# A line is `ModelConfig.width = 256` or `AttentionConfig.num_heads = 4`: a dataclass of the model,
# one of its options, a literal. Nothing else of gin is allowed, so that a preset is data. A size
# that no single device has room for also sets the mesh and the batch (`MeshConfig`, `DataConfig`),
# a recipe that stands or falls with its optimiser also that (`OptimizerConfig` and its sections).

# Where the values of each dataclass go.
_SECTIONS = {"MeshConfig": "mesh", "DataConfig": "data"}
for _name, _class in (("model", ModelConfig), ("optimizer", OptimizerConfig)):
    _SECTIONS[_class.__name__] = _name
    for _path, _section_class, _ in sections_of(_class):
        _SECTIONS[_section_class.__name__] = f"{_name}.{_path}"
# Besides sizes of the model: what makes a step fit its machine.
_OF_THE_MACHINE = ("mesh.fsdp", "mesh.tensor", "data.batch_size", "data.sequence_length")
# Dataclasses that stand in several places have no path of their own.
_REPEATED = {
    name
    for name, count in collections.Counter(
        section_class.__name__ for _, section_class, _ in sections_of(ModelConfig)
    ).items()
    if count > 1
}


def preset_names() -> tuple[str, ...]:
    """The presets that can be named in `preset`, sorted."""
    files = (file.name for file in preset_folder().iterdir())
    return tuple(sorted(name.removesuffix(".gin") for name in files if name.endswith(".gin")))


def load_preset(name: str) -> dict[str, Any]:
    """The nested values of a preset: 'model', of large ones 'mesh' and 'data', of a recipe
    'optimizer'.

    Raises:
      ConfigError: if there is no such preset; lists those there are.
      UserError: if its file cannot be used; names file and line.
    """
    if name not in preset_names():
        raise ConfigError(
            "preset",
            f"{name!r} is unknown; {nearest_hint(str(name), preset_names())}it must be one of "
            f"{', '.join(preset_names())}.",
        )
    file = preset_folder() / f"{name}.gin"
    return parse_preset(file.read_text(encoding="utf-8"), str(file))


def parse_preset(text: str, filename: str) -> dict[str, Any]:
    """The nested values of a run that a gin text binds.

    Raises:
      UserError: naming file and line, if the text is not gin, binds a name that is not declared,
        a value of the wrong type or a name twice, or uses more of gin than literals.
    """
    options = {
        option.path: option
        for option in options_of(RunConfig)
        if option.path.startswith(("model.", "optimizer.")) or option.path in _OF_THE_MACHINE
    }
    values: dict[str, Any] = {"model": {}}
    seen: set[str] = set()
    for statement in _parse(text, filename):
        place = f"{filename}:{statement.location.line_num}"
        path = _path_of(statement, place, list(options))
        if path in seen:
            raise UserError(f"{place}: {path} is bound twice; keep one.")
        seen.add(path)
        value = tuple(statement.value) if isinstance(statement.value, list) else statement.value
        if not has_type(value, options[path].declared):
            raise UserError(f"{place}: {path}: {wrong_type(value, options[path].declared)}")
        *parents, name = path.split(".")
        section = values
        for parent in parents:
            section = section.setdefault(parent, {})
        section[name] = value
    return values


def preset_folder() -> Traversable:
    """The folder with the presets, of an installed package or of a checkout."""
    return _shipped_folder("gin", "gin", "tiny.gin")


def _shipped_folder(installed: str, in_checkout: str, file_name: str) -> Traversable:
    """A folder that comes along: inside an installed package, next to it in a checkout.

    Raises:
      UserError: if there is none with that file, which means a broken installation.
    """
    package = importlib.resources.files("megatransformer_jax")
    places = [package / installed]
    if hasattr(package, "parent"):
        places.append(package.parent / in_checkout)
    for place in places:
        if place.is_dir() and any(file.name == file_name for file in place.iterdir()):
            return place
    raise UserError(
        f"no {file_name} in {' or '.join(map(str, places))}; the installation is incomplete. "
        "Install again: pip install -e . in a checkout, or the wheel."
    )


def _path_of(statement: gin.config_parser.BindingStatement, place: str, known: list[str]) -> str:
    if statement.scope:
        raise UserError(
            f"{place}: scope {statement.scope!r} is not allowed in a preset; remove it."
        )
    if statement.selector not in _SECTIONS:
        raise UserError(
            f"{place}: {statement.selector!r} is not part of a model; "
            f"use one of {', '.join(_SECTIONS)}."
        )
    if statement.selector in _REPEATED:
        raise UserError(
            f"{place}: {statement.selector!r} is in the model more than once; leave it to the "
            "experiment file or the command line."
        )
    parent = _SECTIONS[statement.selector]
    prefix = f"{parent}." if parent else ""
    path = prefix + statement.arg_name
    if path not in known:
        names = [name.removeprefix(prefix) for name in known if name.startswith(prefix)]
        siblings = [name for name in names if "." not in name]
        raise UserError(f"{place}: {unknown_key(path, siblings)}")
    return path


class _LiteralsOnly(gin.config_parser.ParserDelegate):
    """Rejects what would need gin's registry."""

    def configurable_reference(self, scoped_configurable_name: str, evaluate: bool) -> Any:
        raise SyntaxError(f"@{scoped_configurable_name} is not allowed in a preset; give a literal")

    def macro(self, macro_name: str) -> Any:
        raise SyntaxError(f"%{macro_name} is not allowed in a preset; give a literal")


def _parse(text: str, filename: str) -> list[gin.config_parser.BindingStatement]:
    statements = []
    parser = None
    try:
        parser = gin.config_parser.ConfigParser(text, _LiteralsOnly())
        for statement in parser:
            if not isinstance(statement, gin.config_parser.BindingStatement):
                raise UserError(
                    f"{filename}:{statement.location.line_num}: {type(statement).__name__} is not "
                    "allowed in a preset; write Class.option = literal."
                )
            statements.append(statement)
    except (SyntaxError, tokenize.TokenError) as error:
        line = parser.current_token.start[0] if parser is not None else 1
        message = error.msg if isinstance(error, SyntaxError) else error.args[0]
        raise UserError(f"{filename}:{line}: not valid gin: {message}") from error
    return statements


# ------------------------------------------------------------------------------
# Reads an experiment: a Python file with `get_config`, or a YAML or JSON file of values.

_REFERENCE = re.compile(r"(?P<path>.+?\.(py|yaml|yml|json))(:(?P<argument>.*))?", re.DOTALL)
_NAME = re.compile(r"(?P<name>\w+)(:(?P<argument>.*))?", re.DOTALL)


def read_experiment(reference: str) -> dict[str, Any]:
    """The nested values of `path/to/file.py`, `file.py:argument`, `file.yaml` or `file.json`.

    A name alone, such as `recurrent` or `recurrent:tiny`, is an experiment that is shipped.
    Only names and types are checked; the values may be a part of a configuration.

    Raises:
      UserError: if the file is missing or faulty, or a name or a type in it is wrong.
    """
    path, argument = _located(reference)
    if path.suffix == ".py":
        values = plain(_run_get_config(path, argument))
    elif argument is not None:
        raise ConfigError(
            "config", f"{reference!r}: only .py files take an argument; remove ':{argument}'."
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


def _located(reference: str) -> tuple[AnyPath, str | None]:
    """The file that a reference names, and the argument behind its colon."""
    if match := _REFERENCE.fullmatch(reference):
        return as_path("config", match["path"]), match["argument"]
    names = [*experiment_names(), *preset_names()]
    match = _NAME.fullmatch(reference)
    if match and match["name"] in experiment_names():
        return pathlib.Path(str(experiment_folder() / f"{match['name']}.py")), match["argument"]
    if reference and (as_path("config", reference) / "config.json").is_file():
        hint = f"did you mean {reference.rstrip('/') + '/config.json'!r}? "
    else:
        hint = nearest_hint(match["name"] if match else reference, names)
    raise ConfigError(
        "config",
        f"{reference!r} is not an experiment; {hint}A file must end in .py, .yaml, .yml or .json. "
        f"Experiments are {', '.join(experiment_names())}; presets are "
        f"{', '.join(preset_names())}. A .py file or an experiment may be followed by ':argument'.",
    )


def experiment_names() -> tuple[str, ...]:
    """The experiments that are shipped, sorted."""
    files = (file.name for file in experiment_folder().iterdir())
    names = (name.removesuffix(".py") for name in files if name.endswith(".py"))
    return tuple(sorted(name for name in names if not name.startswith("_")))


def experiment_folder() -> Traversable:
    """The folder with the experiments, of an installed package or of a checkout."""
    return _shipped_folder("experiments", "experiments/configs", "recurrent.py")


def experiment_config(name: str, argument: str | None = None) -> Any:
    """What `get_config` of a shipped experiment returns, for experiments that build on it."""
    return _run_get_config(pathlib.Path(str(experiment_folder() / f"{name}.py")), argument)


def parse_variants(
    argument: str, known: Sequence[str], exclusive: Sequence[Sequence[str]] = ()
) -> set[str]:
    """The variants in the argument of a `get_config`, such as 'tiny,diagonal'.

    Args:
      argument: names separated by commas.
      known: those that there are.
      exclusive: groups of which at most one can be chosen.

    Raises:
      UserError: if one is not known, or if two exclude each other; lists what is allowed.
    """
    variants = {word.strip() for word in argument.split(",") if word.strip()}
    unknown = sorted(variants - set(known))
    if unknown:
        raise UserError(
            f"unknown variant {unknown[0]!r}; {nearest_hint(unknown[0], known)}known: "
            f"{', '.join(known)} (separate several by commas)."
        )
    for group in exclusive:
        chosen = [name for name in group if name in variants]
        if len(chosen) > 1:
            raise UserError(
                f"variants {' and '.join(map(repr, chosen[:2]))} exclude each other; choose one of "
                f"{', '.join(group)}."
            )
    return variants


def _run_get_config(path: AnyPath, argument: str | None) -> Any:
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


def _last_line_in(path: AnyPath, error: Exception) -> int:
    """Line of `path` that an error came from."""
    if isinstance(error, SyntaxError) and error.filename == os.fspath(path):
        return error.lineno or 0
    frames = traceback.extract_tb(sys.exc_info()[2])
    lines = [frame.lineno for frame in frames if frame.filename == os.fspath(path)]
    return (lines[-1] if lines else 0) or 0
