"""Why and when rows end."""

import jax.numpy as jnp
import numpy as np
from tiny_model import Pieces

from megatransformer_jax.generation.endings import (
    END_OF_TEXT,
    EXHAUSTED,
    FINISH_REASONS,
    LENGTH,
    RUNNING,
    STOP,
    Ending,
    exhaust,
    piece_table,
    stop_strings,
)


def ending(end_ids=(2,), max_new_tokens=10, stop=()):
    stops = stop_strings(stop, piece_table(Pieces(), 32)) if stop else None
    return Ending(jnp.asarray(end_ids, jnp.int32), jnp.asarray(max_new_tokens, jnp.int32), stops)


def reasons_of(end, columns):
    """The reasons of all rows after each column of tokens."""
    state = end.init(len(columns[0]))
    reasons = []
    for number, tokens in enumerate(columns, 1):
        tokens = jnp.asarray(tokens, jnp.int32)
        state = end.update(state, tokens, jnp.full(tokens.shape, number, jnp.int32))
        reasons.append(state.reason.tolist())
    return reasons


def test_names_belong_to_codes():
    names = {RUNNING: "running", END_OF_TEXT: "end_of_text", STOP: "stop", LENGTH: "length"}
    names[EXHAUSTED] = "exhausted"
    assert tuple(names[code] for code in range(5)) == FINISH_REASONS


def test_any_end_token_ends_its_row_and_an_ended_row_stays_as_it_is():
    reasons = reasons_of(ending((2, 9)), [[4, 9, 4], [2, 4, 4], [9, 2, 4]])
    assert reasons == [
        [RUNNING, END_OF_TEXT, RUNNING],
        [END_OF_TEXT, END_OF_TEXT, RUNNING],
        [END_OF_TEXT, END_OF_TEXT, RUNNING],
    ]
    # A row that ended by length is not ended again by what comes behind.
    assert reasons_of(ending(max_new_tokens=1), [[4], [2]]) == [[LENGTH], [LENGTH]]


def test_without_end_tokens_only_the_length_ends():
    assert reasons_of(ending(()), [[2], [0]]) == [[RUNNING], [RUNNING]]
    assert reasons_of(ending((), [2, 3]), [[2, 2]] * 3) == [[0, 0], [LENGTH, 0], [LENGTH, LENGTH]]


def test_of_several_reasons_the_end_token_comes_first_then_a_stop():
    encode = Pieces().encode
    b, x = encode("b")[0], encode("x")[0]
    end = ending(max_new_tokens=2, stop=("xb",))
    assert reasons_of(end, [[x, x, x], [b, 2, x]])[1] == [STOP, END_OF_TEXT, LENGTH]


def test_stops_are_found_inside_and_across_tokens_but_not_across_rows():
    pieces = Pieces().pieces
    abc, x, xab, c = (pieces.index(piece) for piece in (b"abc", b"x", b"xab", b"c"))
    end = ending(stop=("bc", "\u20ac"))
    assert reasons_of(end, [[abc, x, xab], [x, c, c]]) == [
        [STOP, RUNNING, RUNNING],
        [STOP, RUNNING, STOP],
    ]
    euro = [pieces.index(piece) for piece in (b"\xe2", b"\x82", b"\xac b")]
    assert reasons_of(end, [[token] for token in euro]) == [[RUNNING], [RUNNING], [STOP]]


def test_only_running_rows_are_exhausted():
    end = ending()
    state = end.update(end.init(3), jnp.array([2, 4, 4]), jnp.ones(3, jnp.int32))
    state = exhaust(state, jnp.array([True, True, False]))
    assert state.reason.tolist() == [END_OF_TEXT, EXHAUSTED, RUNNING]
    np.testing.assert_array_equal(state.is_running, [False, False, True])
