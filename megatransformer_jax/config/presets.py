"""Named model sizes: gin/*.gin, parsed without gin's global registry.

A line is `ModelConfig.width = 256` or `AttentionConfig.num_heads = 4`: a dataclass of the model,
one of its options, a literal. Nothing else of gin is allowed, so that a preset is data.
"""

import collections
import importlib.resources
import tokenize
from importlib.resources.abc import Traversable
from typing import Any

import gin.config_parser

from megatransformer_jax.config.model import ModelConfig
from megatransformer_jax.config.option import ConfigError, UserError, has_type, wrong_type
from megatransformer_jax.config.schema import options_of, sections_of, unknown_key

# Where the values of each dataclass go. Presets hold model sizes only.
_SECTIONS = {"ModelConfig": ""} | {
    section_class.__name__: path for path, section_class, _ in sections_of(ModelConfig)
}
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
    """The nested values of a preset, below the key 'model'.

    Raises:
      ConfigError: if there is no such preset; lists those there are.
      UserError: if its file cannot be used; names file and line.
    """
    if name not in preset_names():
        raise ConfigError(
            "preset", f"{name!r} is unknown; it must be one of {', '.join(preset_names())}."
        )
    file = preset_folder() / f"{name}.gin"
    return {"model": parse_preset(file.read_text(encoding="utf-8"), str(file))}


def parse_preset(text: str, filename: str) -> dict[str, Any]:
    """The nested model values that a gin text binds.

    Raises:
      UserError: naming file and line, if the text is not gin, binds a name that is not declared,
        a value of the wrong type or a name twice, or uses more of gin than literals.
    """
    options = {option.path: option for option in options_of(ModelConfig)}
    values: dict[str, Any] = {}
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
    """The folder with the presets, of an installed package or of a checkout.

    Raises:
      UserError: if there is none, which means a broken installation.
    """
    package = importlib.resources.files("megatransformer_jax")
    # In a wheel the presets are inside the package; in a checkout they are beside it.
    places = [package / "gin"]
    if hasattr(package, "parent"):
        places.append(package.parent / "gin")
    for place in places:
        if place.is_dir() and any(file.name == "tiny.gin" for file in place.iterdir()):
            return place
    raise UserError(
        f"no gin presets in {' or '.join(map(str, places))}; the installation is incomplete. "
        "Install again: pip install -e . in a checkout, or the wheel."
    )


def _path_of(statement: gin.config_parser.BindingStatement, place: str, known: list[str]) -> str:
    if statement.scope:
        raise UserError(
            f"{place}: scope {statement.scope!r} is not allowed in a preset; remove it."
        )
    if statement.selector not in _SECTIONS:
        raise UserError(
            f"{place}: {statement.selector!r} is no part of a model; "
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
