"""The options of a configuration dataclass as a flat list of dotted paths.

Command-line flags, error messages, the options page and the gin presets all read this list, so the
dataclasses stay the only place where an option is declared.
"""

import dataclasses
import difflib
import typing
from collections.abc import Iterable, Iterator
from typing import Any

from megatransformer_jax.config.option import ConfigError, OptionCheck, default_of, rules_of


@dataclasses.dataclass(frozen=True)
class Option:
    """One option, seen from the root of the configuration."""

    path: str
    declared: Any  # Its type, such as `int | None`.
    default: Any
    meaning: str
    check: OptionCheck
    rules: tuple[str, ...]  # Cross-field rules in words.


def options_of(config_class: type) -> Iterator[Option]:
    """Every option below a configuration dataclass, in the order of declaration."""
    rules = _rules_by_path(config_class)
    for path, owner, field in _leaves(config_class):
        yield Option(
            path=path,
            declared=typing.get_type_hints(owner)[field.name],
            default=default_of(field),
            meaning=field.metadata["meaning"],
            check=field.metadata["check"],
            rules=tuple(rules.get(path, ())),
        )


def sections_of(config_class: type) -> Iterator[tuple[str, type, str]]:
    """(path, dataclass, meaning) of every section below a configuration dataclass."""
    hints = typing.get_type_hints(config_class)
    for field in dataclasses.fields(config_class):
        declared = hints[field.name]
        if isinstance(declared, type) and dataclasses.is_dataclass(declared):
            yield field.name, declared, field.metadata["meaning"]
            for path, section_class, meaning in sections_of(declared):
                yield f"{field.name}.{path}", section_class, meaning


def section_rules(config_class: type) -> dict[str, list[str]]:
    """Rules about whole sections, in words, by the path of the section."""
    sections = {path for path, *_ in sections_of(config_class)}
    rules = _rules_by_path(config_class)
    return {path: texts for path, texts in rules.items() if path in sections}


def unknown_key(path: str, allowed: Iterable[str]) -> ConfigError:
    """The error for a key that is not declared, with the nearest name and what is allowed."""
    allowed = list(allowed)
    parent, _, name = path.rpartition(".")
    nearest = difflib.get_close_matches(name, allowed, n=1)
    hint = f"did you mean {nearest[0]!r}? " if nearest else ""
    place = f"{parent!r} has" if parent else "there are"
    return ConfigError(path, f"no such option; {hint}{place}: {', '.join(allowed)}.")


def _leaves(config_class: type, prefix: str = "") -> Iterator[tuple[str, type, dataclasses.Field]]:
    hints = typing.get_type_hints(config_class)
    for field in dataclasses.fields(config_class):
        path = prefix + field.name
        if dataclasses.is_dataclass(hints[field.name]):
            yield from _leaves(hints[field.name], f"{path}.")
        else:
            yield path, config_class, field


def _rules_by_path(config_class: type) -> dict[str, list[str]]:
    rules: dict[str, list[str]] = {}
    owners = [("", config_class)]
    owners += [(f"{path}.", owner) for path, owner, _ in sections_of(config_class)]
    for prefix, owner in owners:
        for check in rules_of(owner):
            text = " ".join((check.__doc__ or "").split())
            for path in check.rule_paths:  # type: ignore[attr-defined]
                rules.setdefault(prefix + path, []).append(text)
    return rules
