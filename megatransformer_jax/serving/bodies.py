"""Bodies of requests as JSON: their names and types, and the errors about them."""

import collections
import contextlib
import functools
import json
import math
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from megatransformer_jax.config.generation import GENERATION_OPTIONS, flag_name
from megatransformer_jax.config.option import (
    ConfigError,
    Option,
    UserError,
    has_type,
    nearest_hint,
    options_of,
)
from megatransformer_jax.serving.errors import RequestError

C = typing.TypeVar("C")

# Objects and lists within each other, more than any request needs and fewer than Python's stack.
MAX_NESTING = 64
# Largest number that JSON's readers agree on.
_MAX_INTEGER = 2**63 - 1
# Longest name of a field that may be a misspelt one.
_MAX_NAME = 64

# ------------------------------------------------------------------------------
# JSON.


def read_body(raw: bytes) -> dict[str, Any]:
    """The object that a body holds.

    Raises:
      RequestError: if it is not one JSON object in UTF-8, names a key twice, holds a number that
        is not finite or is beyond 64 bits, or is nested too deeply.
    """
    try:
        value = json.loads(
            raw.decode("utf-8"),
            object_pairs_hook=_unique_keys,
            parse_constant=_no_number,
            parse_float=_whole_if_it_is,
        )
    except RequestError:
        raise
    except RecursionError:
        raise _too_deep() from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise RequestError(
            f"the body is not JSON ({error}); send one object in UTF-8.", code="invalid_json"
        ) from None
    except ValueError:  # More digits than Python reads.
        raise _too_large() from None
    if not isinstance(value, dict):
        raise RequestError(
            f"the body is {kind_of(value)}; send an object such as "
            '{"prompt": "The ", "max_tokens": 16}.',
            code="invalid_json",
        )
    _check_values(value)
    return value


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        counts = collections.Counter(name for name, _ in pairs)
        twice = next(name for name in counts if counts[name] > 1)
        raise RequestError(f"{twice!r} stands twice in an object; keep one.", code="invalid_json")
    return values


def _too_large() -> RequestError:
    return RequestError(
        "the body has a whole number beyond 64 bits; write a smaller one.", code="invalid_json"
    )


def _whole_if_it_is(text: str) -> float | int:
    """JSON takes 2.0 for a whole number."""
    number = float(text)
    return int(number) if number.is_integer() and abs(number) < _MAX_INTEGER else number


def _no_number(word: str) -> typing.NoReturn:
    raise RequestError(f"{word} is not JSON; write a finite number.", code="invalid_json")


def _too_deep() -> RequestError:
    return RequestError(
        f"the body is nested over {MAX_NESTING} levels deep; flatten it.", code="invalid_json"
    )


def _check_values(value: Any) -> None:
    """Checks numbers and nesting, without recursion."""
    waiting = [(value, 1)]
    while waiting:
        value, depth = waiting.pop()
        if depth > MAX_NESTING:
            raise _too_deep()
        for item in value.values() if isinstance(value, dict) else value:
            if isinstance(item, dict | list):
                waiting.append((item, depth + 1))
            elif isinstance(item, float) and not math.isfinite(item):
                raise RequestError(
                    "the body has a number that is too large; write a finite one.",
                    code="invalid_json",
                )
            elif isinstance(item, int) and not -_MAX_INTEGER <= item <= _MAX_INTEGER:
                raise _too_large()


def kind_of(value: Any) -> str:
    """What JSON calls a value, for messages."""
    kinds = {str: "a text", bool: "a boolean", list: "a list", dict: "an object"}
    return "null" if value is None else kinds.get(type(value), "a number")


def is_number(value: Any) -> bool:
    """Whether JSON takes it for a number."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def is_whole(value: Any) -> bool:
    """Whether it is a whole number; JSON takes 2.0 for one too."""
    if isinstance(value, float):
        return value.is_integer()
    return isinstance(value, int) and not isinstance(value, bool)


def same(value: Any, other: Any) -> bool:
    """Equal, and of the same type: True is not 1."""
    return type(value) is type(other) and bool(value == other)


def as_declared(value: Any, declared: Any) -> Any:
    """As an option has it: lists as tuples, and 2.0, which JSON takes for whole, as 2."""
    if declared is Any:  # Inside of what no option has; its check says so.
        return value
    if isinstance(value, list) and not has_type(value, declared):
        items = typing.get_args(declared)[:1] or (Any,)
        return tuple(as_declared(item, items[0]) for item in value)
    if isinstance(value, float) and value.is_integer() and not has_type(value, declared):
        return int(value)
    return value


# ------------------------------------------------------------------------------
# Names of fields, and errors that name them.


@contextlib.contextmanager
def named(param: str = "", **other_names: str) -> Iterator[None]:
    """Errors of options and texts name the field, as the request has it.

    Args:
      param: the field of what is not an option.
      **other_names: what the request calls an option.
    """
    try:
        yield
    except RequestError:
        raise
    except ConfigError as error:
        name = flag_name(error.path)
        name = other_names.get(name, name)
        raise RequestError(f"{name}: {error.problem}", param=name) from None
    except UserError as error:
        raise RequestError(f"{param}: {error}", param=param) from None


def check_names(
    body: Mapping[str, Any], known: Sequence[str], unsupported: Mapping[str, tuple[Any, ...]]
) -> None:
    """Checks that all fields are known, and those that cannot be met ask for nothing.

    Args:
      body: the request.
      known: names of fields.
      unsupported: fields that cannot be met, and the values of each that are allowed besides null.

    Raises:
      RequestError: otherwise, with the nearest name.
    """
    for name, value in body.items():
        if name in unsupported:
            if value is not None and not any(same(value, other) for other in unsupported[name]):
                allowed = ", ".join(map(json.dumps, (None, *unsupported[name])))
                raise RequestError(
                    f"{name}: {json.dumps(value)} cannot be met by this server; leave it out "
                    f"(allowed: {allowed}).",
                    param=name,
                    code="unsupported_value",
                )
        elif name not in known:
            raise unknown_field(name, known)


def unknown_field(name: str, known: Sequence[str], place: str = "") -> RequestError:
    """The error about a field that there is not.

    Args:
      name: of the field.
      known: names that there are.
      place: where it stands; empty: in the body itself.
    """
    path = f"{place}.{name}" if place else name
    # The nearest of a long text takes long to find.
    hint = nearest_hint(name, known) if len(name) <= _MAX_NAME else ""
    if not place and name in GENERATION_OPTIONS:
        return RequestError(
            f"{path}: this option of generation is not one of the server's; {hint}leave it out.",
            param=path,
            code="unsupported_field",
        )
    return RequestError(
        f"{path}: no such field; {hint}there are: {', '.join(known)}.",
        param=path,
        code="unknown_field",
    )


def missing_field(name: str, example: str) -> RequestError:
    """The error about a field that must be given."""
    return RequestError(
        f"{name}: is missing; give it, such as {example}.", param=name, code="missing_field"
    )


@functools.cache
def options_once(kind: type) -> tuple[Option, ...]:
    """The options of a class; each request asks for them."""
    return tuple(options_of(kind))


def read_options(body: Mapping[str, Any], kind: type[C]) -> C:
    """The options of a class among the fields.

    Raises:
      ConfigError: if a value cannot be used.
    """
    owner: type = kind
    values = {
        option.path: as_declared(body[option.path], option.declared)
        for option in options_once(owner)
        if body.get(option.path) is not None
    }
    return kind(**values)
