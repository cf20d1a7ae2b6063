"""Stops are found in the loop and cut off the text; streaming shows no part of one."""

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatransformer_jax.config.option import UserError
from megatransformer_jax.data.tokenizer import BytesTokenizer
from megatransformer_jax.generation.endings import (
    END_OF_TEXT,
    EXHAUSTED,
    LENGTH,
    RUNNING,
    STOP,
    Ending,
    StopFinder,
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


TABLE = piece_table(BYTES, BYTES.vocab_size)
LETTERS = BYTES.encode("ab\n")
update = jax.jit(lambda ending, *args: ending.update(*args))


@given(st.lists(st.sampled_from([*LETTERS, BYTES.eos_id]), min_size=1, max_size=6), stop_lists)
def test_the_host_ends_a_text_where_the_loop_does(tokens: list[int], stops: list[str]):
    automaton = stop_strings(stops, TABLE)
    on_device = Ending(jnp.array([BYTES.eos_id]), jnp.int32(5), automaton)
    without_stops = Ending(jnp.array([BYTES.eos_id]), jnp.int32(5))
    finder = StopFinder(stops, BYTES)
    state, bare = on_device.init(1), without_stops.init(1)
    for count, token in enumerate(tokens, 1):
        given = (jnp.array([token]), jnp.array([count]))
        state, bare = update(on_device, state, *given), update(without_stops, bare, *given)
        reason = finder.reason(token, int(bare.reason[0]))
        assert reason == state.reason[0]
        if reason != RUNNING:
            return


def test_reasons_in_their_order():
    def reason(token: int, code: int) -> int:
        return StopFinder(("\n",), BYTES).reason(token, code)

    a, _, newline = LETTERS
    assert reason(newline, END_OF_TEXT) == END_OF_TEXT
    assert reason(newline, EXHAUSTED) == EXHAUSTED
    assert reason(newline, LENGTH) == STOP
    assert reason(a, LENGTH) == LENGTH
    assert StopFinder((), None).reason(a, RUNNING) == RUNNING


@pytest.mark.parametrize(
    ("stops", "tokenizer", "message"),
    [
        (("",), BYTES, "'' cannot be looked for"),
        (("a",), None, "stop texts need a tokenizer"),
        (("a" * 5000,), BYTES, "have 5001 bytes, more than 4096"),
    ],
)
def test_what_cannot_be_found_is_an_error(stops, tokenizer, message):
    with pytest.raises(UserError, match=message):
        StopFinder(stops, tokenizer)
