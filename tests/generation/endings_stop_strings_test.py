"""Stops are found in the loop and cut off the text; streaming shows no part of one."""

import jax.numpy as jnp
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatransformer_jax.data.tokenizer import BytesTokenizer
from megatransformer_jax.generation.endings import (
    cut_at_stop,
    num_held_back,
    piece_table,
    stop_strings,
)

BYTES = BytesTokenizer()
texts = st.text("ab\n", max_size=12)
stop_lists = st.lists(st.text("ab\n", min_size=1, max_size=4), max_size=3)


@pytest.mark.parametrize(
    ("text", "stops", "expected"),
    [
        ("one. two. three.", (". ",), "one"),
        ("no stop", ("x", "y"), "no stop"),
        ("no stop", (), "no stop"),
        ("xabc", ("abc", "b"), "xa"),  # 'b' is complete before 'abc'
        ("xabc", ("c", "bc", "zz"), "xa"),  # both end here; the longest
        ("stop", ("stop",), ""),
        ("Zeile\n\nUser: a", ("\n\nUser:",), "Zeile"),
    ],
)
def test_text_is_cut(text: str, stops: tuple[str, ...], expected: str):
    assert cut_at_stop(text, stops) == expected


@given(texts, stop_lists)
def test_the_cut_is_where_the_loop_stops(text: str, stops: list[str]):
    """Character by character, the first text with a stop in it decides."""
    expected = text
    for end in range(1, len(text) + 1):
        complete = [len(stop) for stop in stops if text[:end].endswith(stop)]
        if complete:
            expected = text[: end - max(complete)]
            break
    assert cut_at_stop(text, stops) == expected
    assert not any(stop in expected for stop in stops)


@given(texts, stop_lists)
def test_streaming_never_shows_a_part_of_a_stop(text: str, stops: list[str]):
    for end in range(len(text) + 1):
        seen = text[:end]
        if any(stop in seen for stop in stops):
            break
        shown = seen[: end - num_held_back(seen, stops)]
        assert cut_at_stop(text, stops).startswith(shown)
        # And holds back nothing for longer than it must.
        held = seen[len(shown) :]
        assert not held or any(stop.startswith(held) for stop in stops)


def test_rows_stop_in_their_own_token():
    stops = stop_strings(("\n\n", "User:"), piece_table(BYTES, BYTES.vocab_size))
    rows = jnp.array([BYTES.encode("ab\n\ncdefg"), BYTES.encode("a\nb\nUser:")])
    state = stops.init(2)
    found = []
    for column in range(9):
        state, is_stopped = stops.update(state, rows[:, column])
        found.append(is_stopped.tolist())
    assert [row for row, _ in found].index(True) == 3
    assert [row for _, row in found] == [False] * 8 + [True]
