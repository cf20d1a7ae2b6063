"""Declares one configuration option: default, meaning and check in one place.

Every field of the configuration dataclasses is made by `option(...)`. Its metadata is the single
source for run-time checks (`check_options`), for the error messages and for docs/options.md. What
ties several options together is a method marked `@rule(...)`; its docstring goes into the docs.

Below that: reading one option's value from text, and a configuration's options as a flat list.
"""

import ast
import dataclasses
import difflib
import functools
import math
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

C = typing.TypeVar("C")

# Seeds have 32 bits: jax.random.key drops higher ones without an error.
MAX_SEED = 2**32 - 1
# Counts that compiled code gets as int32.
MAX_COUNT = 2**31 - 1
# How a reader recognises them.
_POWERS: dict[float, str] = {MAX_SEED: "2^32 - 1", MAX_COUNT: "2^31 - 1"}


# Exit codes of commands: the same command will fail again; something outside of it has failed, so
# that it may succeed later.
BAD_INPUT = 2
TRY_AGAIN = 3


class UserError(ValueError):
    """Input that cannot be used. Entry points print it without a traceback and exit with 2.

    The message names what was wrong, the value, what is allowed and the fix.

    Attributes:
      exit_code: of a command that it ends: 2, or 3 if the same command may succeed later.

    Examples:
      >>> try:
      ...     mt.configure("recurrent", train={"step": 40})
      ... except mt.UserError as error:
      ...     print(str(error)[:49])
      train.step: no such option; did you mean 'steps'?
    """

    exit_code = BAD_INPUT


class ConfigError(UserError):
    """A configuration value that cannot be used. The message names path, value and fix."""

    def __init__(self, path: str, problem: str):
        self.path = path
        self.problem = problem
        super().__init__(f"{path}: {problem}" if path else problem)

    def __reduce__(self) -> tuple[Any, ...]:
        # Exceptions are pickled by their message alone, and processes send theirs to each other.
        return ConfigError, (self.path, self.problem)

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
    words: tuple[str, ...] = ()  # next to numbers

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
        return ", or ".join([" and ".join(parts), *map(repr, self.words)])

    def allows(self, value: Any) -> bool:
        """Whether a value of the right type passes. A tuple passes when each of its items does."""
        if isinstance(value, tuple):
            return all(self.allows(item) for item in value)
        if self.choices:
            return value in self.choices
        if self.words and isinstance(value, str):
            return value in self.words
        return not (
            (self.minimum is not None and not value >= self.minimum)
            or (self.maximum is not None and not value <= self.maximum)
            or (self.above is not None and not value > self.above)
            or (self.below is not None and not value < self.below)
        )


def _number(value: float) -> str:
    """Whole numbers in full, others as short as they can be."""
    if value in _POWERS:
        return _POWERS[value]
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
    words: Sequence[str] = (),
) -> Any:
    """A dataclass field with its default, its meaning in words and what is allowed: `choices` of
    texts, bounds of numbers, and `words` that may stand in place of a number."""
    check = OptionCheck(tuple(choices), minimum, maximum, above, below, tuple(words))
    return dataclasses.field(default=default, metadata={"meaning": meaning, "check": check})


def compilation_cache_option() -> Any:
    """Where compiled programs are kept, for all that compiles."""
    return option(
        "auto",
        "Folder, also at gs:// or s3://, that keeps compiled programs, so that the next start need "
        "not compile them again. "
        "auto: the folder that JAX is set to, otherwise ~/.cache/megatransformer_jax/xla. "
        "None: as JAX is set, which keeps nothing by default.",
    )


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
    """The methods of a configuration dataclass that are marked with `rule`, in their order.

    Those of its bases come first.
    """
    for owner in reversed(config_class.__mro__):
        for member in vars(owner).values():
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


def require_function_name(config: Any, option_name: str) -> None:
    """Checks that an option is None or names a function of the user's, 'package.module:name'.

    Raises:
      ConfigError: otherwise.
    """
    value = getattr(config, option_name)
    if value is None:
        return
    module, _, name = value.partition(":")
    if not all(part.isidentifier() for part in (*module.split("."), *name.split("."))):
        raise ConfigError(option_name, f"{value!r} names no function; write 'package.module:name'.")


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
    config_class: type = type(config)
    hints = _declared_types(config_class)
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
            hint = nearest_hint(value, check.choices) if isinstance(value, str) else ""
            raise ConfigError(
                field.name,
                f"{value!r} is not allowed; {hint}{subject} must be {check.describe()}.",
            )


@functools.cache
def _declared_types(config_class: type) -> Mapping[str, Any]:
    """The type of each field. Resolving them takes most of the time of a check."""
    return types.MappingProxyType(typing.get_type_hints(config_class))


def wrong_type(value: Any, declared: Any) -> str:
    """The words of the error for a value of the wrong type."""
    return (
        f"{value!r} is of type {type(value).__name__}; allowed: {type_name(declared)}. "
        "Give a value of that type."
    )


def has_type(value: Any, declared: Any, exact: bool = False) -> bool:
    """Whether `value` is of the declared type.

    A `bool` does not count as an `int`; an `int` is accepted as a `float` unless `exact` is set.
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


# ------------------------------------------------------------------------------
# Reading one option's value from text, by its declared type: the command line.

_BOOLEANS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}


def parse_text(text: str, declared: Any) -> Any:
    """The value that `text` stands for.

    Strings are taken as they are. 'None' is None where None is allowed. The items of a tuple are
    separated by commas; a text that starts with a bracket is read as a Python list or tuple, whose
    items may hold commas.

    Raises:
      UserError: if the text does not fit the type.
    """
    if typing.get_origin(declared) in (typing.Union, types.UnionType):
        parts = [part for part in typing.get_args(declared) if part is not type(None)]
        if text in ("None", "none"):
            return None
        try:
            return parse_text(text, parts[0])
        except UserError as error:
            if str in parts:
                return text
            raise UserError(f"{error} (None is allowed too.)") from None
    if typing.get_origin(declared) is tuple:
        return _parse_tuple(text, declared)
    if declared is str:
        return text
    if declared is bool:
        return _convert(lambda word: _BOOLEANS[word.lower()], text, "true or false")
    if declared is int:
        return _convert(int, text, "a whole number, such as 1000")
    if declared is float:
        return _convert(float, text, "a number")
    raise TypeError(f"options of type {declared} cannot be read from text")


def _convert(convert: Callable[[str], Any], text: str, allowed: str) -> Any:
    try:
        return convert(text)
    except (ValueError, KeyError):
        raise UserError(f"{text!r} is not {allowed}.") from None


def _parse_tuple(text: str, declared: Any) -> tuple[Any, ...]:
    if not text:
        return ()
    if text[0] not in "([":
        item_type = typing.get_args(declared)[0]
        return tuple(parse_text(item, item_type) for item in text.split(","))
    try:
        value = ast.literal_eval(text)
    except (SyntaxError, ValueError):
        value = None
    if isinstance(value, (list, tuple)) and has_type(tuple(value), declared):
        return tuple(value)
    raise UserError(
        f"{text!r} is no {type_name(declared)}; write items separated by commas, or a Python list "
        "such as \"['a, b', 'c']\"."
    )


# ------------------------------------------------------------------------------
# The options of a configuration dataclass as a flat list of dotted paths.
#
# Command-line flags, error messages, the options page and the gin presets all read this list, so
# the dataclasses stay the only place where an option is declared.


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
    """Every option below a configuration dataclass: its own, then those of each section."""
    rules = _rules_by_path(config_class)
    for path, owner, field in _leaves(config_class):
        yield Option(
            path=path,
            declared=_declared_types(owner)[field.name],
            default=default_of(field),
            meaning=field.metadata["meaning"],
            check=field.metadata["check"],
            rules=tuple(rules.get(path, ())),
        )


def sections_of(config_class: type) -> Iterator[tuple[str, type, str]]:
    """(path, dataclass, meaning) of every section below a configuration dataclass."""
    hints = _declared_types(config_class)
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
    hint = nearest_hint(name, allowed)
    place = f"{parent!r} has" if parent else "there are"
    return ConfigError(path, f"no such option; {hint}{place}: {', '.join(allowed)}.")


def nearest_hint(name: str, allowed: Iterable[str], written: Callable[[str], str] = repr) -> str:
    """'did you mean X? ' with the name that is nearest to a misspelt one; empty if none is.

    Args:
      name: the misspelt one.
      allowed: the names that there are.
      written: how a name is shown; a flag has its dashes in front, and no quotes.
    """
    nearest = difflib.get_close_matches(name, list(allowed), n=1)
    return f"did you mean {written(nearest[0])}? " if nearest else ""


def _leaves(config_class: type, prefix: str = "") -> Iterator[tuple[str, type, dataclasses.Field]]:
    hints = _declared_types(config_class)
    fields = dataclasses.fields(config_class)
    sections = [field for field in fields if dataclasses.is_dataclass(hints[field.name])]
    for field in fields:
        if field not in sections:
            yield prefix + field.name, config_class, field
    for field in sections:
        yield from _leaves(hints[field.name], f"{prefix}{field.name}.")


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


# ------------------------------------------------------------------------------
# Values as people write them in Python.


def declared_values(values: Mapping[str, Any], declared: Mapping[str, Option]) -> dict[str, Any]:
    """Values by name, with a tuple where one is declared: from a list, or around a single item.

    Raises:
      ConfigError: for a name that is not declared, with the nearest.
    """
    converted = {}
    for name, value in values.items():
        if name not in declared:
            raise unknown_key(name, declared)
        converted[name] = as_tuple(value, declared[name].declared)
    return converted


def from_options(config: type[C], values: Mapping[str, Any]) -> C:
    """A configuration from a function's keyword arguments.

    Raises:
      ConfigError: as `declared_values`, or for a value that a rule refuses.
    """
    declared = {option.path: option for option in options_of(config)}
    return config(**declared_values(values, declared))


def part_of(options: Any, config: type[C]) -> C:
    """The options of a command that are those of a configuration."""
    names = (option.path for option in options_of(config))
    return config(**{name: getattr(options, name) for name in names})


def as_python(value: Any) -> Any:
    """A number of NumPy or JAX, or an array with one and no axes, as Python's; others unchanged."""
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):
        return value.item()
    return value


def as_whole(
    name: str, value: Any, minimum: int, maximum: int, fix: str = "Give a whole number."
) -> int:
    """A whole number within inclusive bounds; NumPy's and JAX's are taken too.

    Raises:
      ConfigError: for anything else.
    """
    number = as_python(value)
    if isinstance(number, bool) or not isinstance(number, int):
        raise ConfigError(name, f"{value!r} is not a whole number from {minimum} up. {fix}")
    if not minimum <= number <= maximum:
        raise ConfigError(name, f"{number} is not allowed; it must be {minimum} to {maximum}.")
    return number


def as_tuple(value: Any, declared: Any) -> Any:
    """A list, or a single item, as a tuple where one is declared; numbers as Python's."""
    value = as_python(value)
    if typing.get_origin(declared) is not tuple:
        return value
    if isinstance(value, (list, tuple)):
        return tuple(map(as_python, value))
    item = typing.get_args(declared)[0]
    return (value,) if type(value) is item else value
