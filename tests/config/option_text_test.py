import typing
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatransformer_jax.config.option import UserError, parse_text

Words = tuple[str, ...]
Numbers = tuple[int, ...]


@pytest.mark.parametrize(
    ("text", "declared", "value"),
    [
        ("12", int, 12),
        ("-1", int, -1),
        ("3", float, 3.0),
        ("1e-3", float, 1e-3),
        ("true", bool, True),
        ("False", bool, False),
        ("None", int | None, None),
        ("7", int | None, 7),
        ("None", str | None, None),
        ("None", str, "None"),
        ("1", str | None, "1"),
        ("a=b c,(d", str, "a=b c,(d"),
        ("", str, ""),
        ("", Words, ()),
        ("()", Words, ()),
        ("1,2,4", Numbers, (1, 2, 4)),
        ("(1,2,4)", Numbers, (1, 2, 4)),
        ("[1, 2]", Numbers, (1, 2)),
        ("(3,)", Numbers, (3,)),
        ("The ,If", Words, ("The ", "If")),
        ("['a, b', 'c']", Words, ("a, b", "c")),
        ("XLA_FLAGS=--a=1 --b", Words, ("XLA_FLAGS=--a=1 --b",)),
    ],
)
def test_text_is_read_by_the_declared_type(text: str, declared: Any, value: Any) -> None:
    parsed = parse_text(text, declared)
    assert parsed == value
    assert type(parsed) is type(value)


@pytest.mark.parametrize(
    ("text", "declared", "problem"),
    [
        ("1e3", int, "whole number"),
        ("2.0", int | None, "whole number.*None is allowed"),
        ("fast", float, "not a number"),
        ("on", bool, "true or false"),
        ("1,x", Numbers, "'x' is not a whole number"),
        ("(1,", Numbers, "no tuple of int"),
        ("(1)", Numbers, "no tuple of int"),
        ("[1]", Words, "no tuple of str"),
    ],
)
def test_text_that_does_not_fit_is_an_error(text: str, declared: Any, problem: str) -> None:
    with pytest.raises(UserError, match=problem):
        parse_text(text, declared)


def test_a_type_without_a_reading_is_a_mistake_of_the_programmer() -> None:
    with pytest.raises(TypeError):
        parse_text("x", typing.Mapping)


@given(st.lists(st.text()))
def test_any_strings_can_be_given_as_a_python_list(items: list[str]) -> None:
    assert parse_text(repr(items), Words) == tuple(items)


@given(st.floats(allow_nan=False))
def test_any_float_comes_back_exactly(value: float) -> None:
    assert parse_text(repr(value), float) == value
