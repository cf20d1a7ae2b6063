"""Reads one option's value from text, by its declared type. Used for the command line."""

import ast
import types
import typing
from collections.abc import Callable
from typing import Any

from megatransformer_jax.config.option import UserError, has_type, type_name

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
