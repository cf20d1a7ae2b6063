"""Declares one configuration option: default, meaning and check in one place.

Every field of the configuration dataclasses is made by `option(...)`. Its metadata is the single
source for run-time checks (`check_options`), for the error messages and for docs/options.md. What
ties several options together is a method marked `@rule(...)`; its docstring goes into the docs.
"""

import dataclasses
import math
import types
import typing
from collections.abc import Callable, Iterator, Sequence
from typing import Any

# Seeds have 32 bits: jax.random.key drops higher ones without an error.
MAX_SEED = 2**32 - 1
# Counts that compiled code gets as int32.
MAX_COUNT = 2**31 - 1


class UserError(ValueError):
    """Input that cannot be used. Entry points print it without a traceback and exit with 2.

    The message names what was wrong, the value, what is allowed and the fix.
    """


class ConfigError(UserError):
    """A configuration value that cannot be used. The message names path, value and fix."""

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
            parts.append(f"at least {_number(self.minimum)}")
        if self.above is not None:
            parts.append(f"above {_number(self.above)}")
        if self.maximum is not None:
            parts.append(f"at most {_number(self.maximum)}")
        if self.below is not None:
            parts.append(f"below {_number(self.below)}")
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


def _number(value: float) -> str:
    """Whole numbers in full, others as short as they can be."""
    return str(value) if isinstance(value, int) else f"{value:g}"


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


def rule(*paths: str) -> Callable[[Callable[[Any], None]], Callable[[Any], None]]:
    """Marks a method as a check that concerns several options.

    The method raises `ConfigError` when the check fails. Its docstring states the rule and is
    printed in docs/options.md with the options at `paths` (relative to the class).
    """

    def mark(method: Callable[[Any], None]) -> Callable[[Any], None]:
        method.rule_paths = paths  # type: ignore[attr-defined]
        return method

    return mark


def rules_of(config_class: type) -> Iterator[Callable[[Any], None]]:
    """The methods of a configuration dataclass that are marked with `rule`, in their order."""
    for member in vars(config_class).values():
        if hasattr(member, "rule_paths"):
            yield member


def require_defaults(config: Any, names: Sequence[str], because: str, fix: str) -> None:
    """Rejects options that would have no effect, so that none is accepted and ignored.

    Raises:
      ConfigError: if one of the named options is not at its default; of a section, naming the
        option in it.
    """
    for name in names:
        value, default = getattr(config, name), default_of(config.__dataclass_fields__[name])
        if value == default:
            continue
        if dataclasses.is_dataclass(value):
            inner = [field.name for field in dataclasses.fields(value)]
            try:
                require_defaults(value, inner, because, fix)
            except ConfigError as error:
                raise error.below(name) from None
        raise ConfigError(
            name, f"{value!r} would be ignored {because}; {fix}, or leave it at {default!r}."
        )


def default_of(field: dataclasses.Field) -> Any:
    """The default of an option, or a section made of defaults."""
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def check_options(config: Any) -> None:
    """Checks every option of a configuration dataclass for type and range, then its rules.

    Called from each `__post_init__`, so that no invalid configuration object can exist. A whole
    number given for a float is stored as a float, so that saving and loading changes nothing.

    Raises:
      ConfigError: naming the field, its value, what is allowed and the fix.
    """
    _check_each(config)
    for check in rules_of(type(config)):
        check(config)


def _check_each(config: Any) -> None:
    hints = typing.get_type_hints(type(config))
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        declared = hints[field.name]
        if not has_type(value, declared):
            raise ConfigError(field.name, wrong_type(value, declared))
        if isinstance(value, int) and not has_type(value, declared, exact=True):
            value = float(value)
            object.__setattr__(config, field.name, value)
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(field.name, f"{value!r} is not allowed; it must be a finite number.")
        check = field.metadata.get("check")
        if check is not None and value is not None and not check.allows(value):
            subject = "each item" if isinstance(value, tuple) else "it"
            raise ConfigError(
                field.name, f"{value!r} is not allowed; {subject} must be {check.describe()}."
            )


def wrong_type(value: Any, declared: Any) -> str:
    """The words of the error for a value of the wrong type."""
    return (
        f"{value!r} is of type {type(value).__name__}; allowed: {type_name(declared)}. "
        "Give a value of that type."
    )


def has_type(value: Any, declared: Any, exact: bool = False) -> bool:
    """Whether `value` is of the declared type.

    A bool is no int. An int serves as a float, unless `exact`.
    """
    origin = typing.get_origin(declared)
    if origin in (typing.Union, types.UnionType):
        return any(has_type(value, part, exact) for part in typing.get_args(declared))
    if origin is tuple:
        item_types = typing.get_args(declared)
        if not isinstance(value, tuple):
            return False
        if len(item_types) == 2 and item_types[1] is Ellipsis:
            return all(has_type(item, item_types[0], exact) for item in value)
        return len(value) == len(item_types) and all(
            has_type(item, item_type, exact)
            for item, item_type in zip(value, item_types, strict=True)
        )
    if declared is type(None):
        return value is None
    if declared is bool:
        return isinstance(value, bool)
    if isinstance(value, bool):
        return False
    if declared is float:
        return isinstance(value, float if exact else (int, float))
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
