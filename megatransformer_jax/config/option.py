"""Declares one configuration option: default, meaning and check in one place.

Every field of the configuration dataclasses is made by `option(...)`. Its metadata is the single
source for run-time checks (`check_options`), for the error messages and for docs/options.md.
"""

import dataclasses
import types
import typing
from collections.abc import Sequence
from typing import Any


class ConfigError(ValueError):
    """A configuration value that cannot be used. The message names the path, the value and the fix."""

    def __init__(self, path: str, problem: str):
        self.path = path
        self.problem = problem
        super().__init__(f"{path}: {problem}" if path else problem)

    def below(self, parent: str) -> "ConfigError":
        """The same error seen from `parent`, whose field it was raised in."""
        return ConfigError(".".join(part for part in (parent, self.path) if part), self.problem)


@dataclasses.dataclass(frozen=True)
class OptionCheck:
    """What is allowed for one option. Bounds are inclusive unless the name says otherwise."""

    choices: tuple[str, ...] = ()
    minimum: float | None = None
    maximum: float | None = None
    above: float | None = None
    below: float | None = None

    def describe(self) -> str:
        """Words for the options page and for error messages; empty when everything is allowed."""
        if self.choices:
            return "one of " + ", ".join(repr(choice) for choice in self.choices)
        parts = []
        if self.minimum is not None:
            parts.append(f"at least {self.minimum:g}")
        if self.above is not None:
            parts.append(f"above {self.above:g}")
        if self.maximum is not None:
            parts.append(f"at most {self.maximum:g}")
        if self.below is not None:
            parts.append(f"below {self.below:g}")
        return " and ".join(parts)

    def allows(self, value: Any) -> bool:
        """Whether a value of the right type passes. A tuple passes when each of its items does."""
        if isinstance(value, tuple):
            return all(self.allows(item) for item in value)
        if self.choices:
            return value in self.choices
        return not (
            (self.minimum is not None and not value >= self.minimum)
            or (self.maximum is not None and not value <= self.maximum)
            or (self.above is not None and not value > self.above)
            or (self.below is not None and not value < self.below)
        )


def option(
    default: Any,
    meaning: str,
    *,
    choices: Sequence[str] = (),
    minimum: float | None = None,
    maximum: float | None = None,
    above: float | None = None,
    below: float | None = None,
) -> Any:
    """A dataclass field with its default, its meaning in words and what is allowed."""
    check = OptionCheck(tuple(choices), minimum, maximum, above, below)
    return dataclasses.field(default=default, metadata={"meaning": meaning, "check": check})


def section(config_class: type, meaning: str) -> Any:
    """A dataclass field that holds another configuration dataclass."""
    return dataclasses.field(default_factory=config_class, metadata={"meaning": meaning})


def check_options(config: Any) -> None:
    """Checks type and range of every option of a configuration dataclass.

    Called from each `__post_init__`, so that no invalid configuration object can exist.

    Raises:
      ConfigError: naming the field, its value, what is allowed and the fix.
    """
    hints = typing.get_type_hints(type(config))
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        declared = hints[field.name]
        if not has_type(value, declared):
            raise ConfigError(
                field.name,
                f"{value!r} is of type {type(value).__name__}; allowed: {type_name(declared)}. "
                f"Give a value of that type.",
            )
        check = field.metadata.get("check")
        if check is not None and value is not None and not check.allows(value):
            raise ConfigError(
                field.name, f"{value!r} is not allowed; it must be {check.describe()}."
            )


def has_type(value: Any, declared: Any) -> bool:
    """Whether `value` is of the declared type. A bool is no int; an int serves as a float."""
    origin = typing.get_origin(declared)
    if origin in (typing.Union, types.UnionType):
        return any(has_type(value, option_type) for option_type in typing.get_args(declared))
    if origin is tuple:
        item_types = typing.get_args(declared)
        if not isinstance(value, tuple):
            return False
        if len(item_types) == 2 and item_types[1] is Ellipsis:
            return all(has_type(item, item_types[0]) for item in value)
        return len(value) == len(item_types) and all(map(has_type, value, item_types))
    if declared is type(None):
        return value is None
    if declared is bool:
        return isinstance(value, bool)
    if isinstance(value, bool):
        return False
    if declared is float:
        return isinstance(value, (int, float))
    return isinstance(value, declared)


def type_name(declared: Any) -> str:
    """The declared type as a user writes it: `int`, `float or None`, `tuple of str`."""
    origin = typing.get_origin(declared)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(type_name(part) for part in typing.get_args(declared))
    if origin is tuple:
        return f"tuple of {type_name(typing.get_args(declared)[0])}"
    if declared is type(None):
        return "None"
    return getattr(declared, "__name__", str(declared))
