import json
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatransformer_jax.serving.bodies import MAX_NESTING, check_names, read_body, unknown_field
from megatransformer_jax.serving.errors import RequestError

JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63) + 1, 2**63 - 1) | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@pytest.mark.parametrize(
    ("raw", "problem"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"\xff{}", "not JSON"),
        (b"\xef\xbb\xbf{}", "BOM"),
        (b"[1]", "is a list"),
        (b"null", "is null"),
        (b'{"a": 1, "a": 2}', "'a' stands twice"),
        (b'{"a": {"b": 1, "b": 2}}', "'b' stands twice"),
        (b'{"a": NaN}', "NaN is not JSON"),
        (b'{"a": -Infinity}', "-Infinity is not JSON"),
        (b'{"a": 1e999}', "too large"),
        (b'{"a": [9223372036854775808]}', "beyond 64 bits"),
        (b'{"a": ' + b"9" * 5000 + b"}", "beyond 64 bits"),
        (b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested over 64 levels"),
        (b'{"a": ' + b"[" * MAX_NESTING + b"]" * MAX_NESTING + b"}", "nested over 64"),
    ],
)
def test_what_is_not_one_object_of_json_is_refused(raw: bytes, problem: str) -> None:
    with pytest.raises(RequestError, match=problem) as caught:
        read_body(raw)
    assert (caught.value.status, caught.value.code) == (400, "invalid_json")


def test_a_name_that_stands_twice_is_found_fast_among_many() -> None:
    names = ",".join(f'"{number}": 0' for number in range(60_000))
    start = time.process_time()
    with pytest.raises(RequestError, match="'59999' stands twice"):
        read_body(f'{{{names}, "59999": 1}}'.encode())
    assert time.process_time() - start < 5  # A minute, if each were counted among all.


def test_as_many_levels_as_are_allowed_are_read() -> None:
    raw = b'{"a": ' + b"[" * (MAX_NESTING - 1) + b"]" * (MAX_NESTING - 1) + b"}"
    assert list(read_body(raw)) == ["a"]


def test_a_whole_number_may_be_written_with_a_point() -> None:
    found = read_body(b'{"a": [2.0, -0.0, 1e3, 2.5, 1e300]}')["a"]
    assert [type(number) for number in found] == [int, int, int, float, float]


@given(st.dictionaries(st.text(), JSON_VALUES, max_size=4))
def test_every_finite_object_comes_back(value: dict[str, Any]) -> None:
    raw = json.dumps(value).encode()
    if b"Infinity" in raw or b"NaN" in raw:
        value = json.loads(raw, parse_constant=lambda word: word)
        try:
            assert read_body(raw) == value  # Only texts had the words.
        except RequestError as error:
            assert error.code == "invalid_json"
    else:
        assert read_body(raw) == value


@given(st.binary(max_size=40))
def test_any_bytes_are_read_or_refused(raw: bytes) -> None:
    try:
        assert isinstance(read_body(raw), dict)
    except RequestError as error:
        assert error.code == "invalid_json"


def test_an_unknown_field_is_told_the_nearest_name() -> None:
    error = unknown_field("exit_threshhold", ["depth", "exit_threshold"])
    assert "did you mean 'exit_threshold'?" in str(error)
    assert (error.param, error.code) == ("exit_threshhold", "unknown_field")
    inside = unknown_field("rol", ["role"], "messages[0]")
    assert inside.param == "messages[0].rol"
    # One that `generate` has is not called unknown.
    other = unknown_field("max_new_tokens", ["max_tokens"])
    assert (other.code, "did you mean 'max_tokens'?" in str(other)) == ("unsupported_field", True)


def test_values_that_ask_for_nothing_may_stand_in_fields_that_cannot_be_met() -> None:
    unsupported = {"best_of": (1,), "tools": ([],)}
    check_names({"best_of": 1, "tools": []}, (), unsupported)
    check_names({"best_of": None, "tools": None}, (), unsupported)
    for value in (2, True, "1", 1.5):
        with pytest.raises(RequestError, match="cannot be met") as caught:
            check_names({"best_of": value}, (), unsupported)
        assert caught.value.code == "unsupported_value"
