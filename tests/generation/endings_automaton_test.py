"""The automaton finds exactly what a search in the text finds, wherever tokens begin and end."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatransformer_jax.config.data import DataConfig, TokenizerConfig
from megatransformer_jax.config.option import UserError
from megatransformer_jax.data.sources import training_texts
from megatransformer_jax.data.tokenizer import (
    BytesTokenizer,
    SentencePieceTokenizer,
    train_sentencepiece,
)
from megatransformer_jax.generation.endings import (
    MIN_STATES,
    PieceTable,
    StopFinder,
    TextAutomaton,
    piece_table,
    text_automaton,
)

BYTES = BytesTokenizer()


@pytest.fixture(scope="module")
def trained() -> SentencePieceTokenizer:
    texts = list(training_texts(DataConfig()))[:12]
    return SentencePieceTokenizer(train_sentencepiece(TokenizerConfig(vocab_size=600), texts))


@pytest.fixture(scope="module")
def tables(trained: SentencePieceTokenizer) -> dict[str, PieceTable]:
    return {
        "trained": piece_table(trained, trained.vocab_size),
        "bytes": piece_table(BYTES, BYTES.vocab_size),
    }


@dataclasses.dataclass(frozen=True)
class Pieces:
    """Tokens of given texts."""

    pieces: tuple[str, ...]

    def piece_bytes(self, token: int) -> bytes:
        return self.pieces[token].encode()

    def table(self) -> PieceTable:
        contents = [piece.encode() for piece in self.pieces]
        sizes = np.array([len(content) for content in contents], np.int32)
        rows = [list(content.ljust(sizes.max(), b"\0")) for content in contents]
        return PieceTable(np.array(rows, np.uint8), sizes)


def hits(automaton: TextAutomaton, ids: list[int]) -> list[bool]:
    """By NumPy, as hypothesis runs this often; `test_it_runs_in_a_loop` runs the real thing."""
    transitions, state, found = np.asarray(automaton.transitions), int(automaton.roots[0]), []
    for token in ids:
        entry = int(transitions[state, token])
        found.append(entry < 0)
        state = ~entry if entry < 0 else entry
    return found


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_it_finds_what_a_search_in_the_text_finds(
    trained: SentencePieceTokenizer, tables: dict[str, PieceTable], data: st.DataObject
):
    """Ids at random, which mixes pieces, bytes of broken characters and special tokens."""
    name = data.draw(st.sampled_from(["trained", "bytes"]))
    tokenizer = trained if name == "trained" else BYTES
    ids: list[int] = []
    for token in data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=25)):
        # A special token after an unfinished character would take it apart.
        is_special = not tokenizer.piece_bytes(token)
        if not (is_special and ids and tokenizer.piece_bytes(ids[-1])[-1:] >= b"\x80"):
            ids.append(token)
    text = tokenizer.decode(ids)
    parts = [part for part in text.split("\ufffd") if part] or ["a"]
    substrings = st.sampled_from(parts).flatmap(
        lambda part: st.tuples(st.just(part), st.integers(0, len(part) - 1), st.integers(1, 8)).map(
            lambda draw: draw[0][draw[1] : draw[1] + draw[2]]
        )
    )
    anything = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=3)
    anything = anything.filter(lambda text: not set("\ufffd\u2581") & set(text))
    stops = data.draw(st.lists(substrings | anything, max_size=4))
    found = hits(text_automaton([stops], tables[name]), ids)
    finder = StopFinder(stops, tokenizer)
    assert [finder.add(token) for token in ids] == found
    for count in range(1, len(ids) + 1):
        is_there = any(stop in tokenizer.decode(ids[:count]) for stop in stops)
        assert any(found[:count]) == is_there


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.text("ab", min_size=1, max_size=4), min_size=2, max_size=6, unique=True),
    st.lists(st.text("ab", min_size=1, max_size=6), min_size=1, max_size=4),
    st.lists(st.integers(0, 100), max_size=20),
)
def test_every_end_is_found_in_its_token(pieces: list[str], stops: list[str], draws: list[int]):
    """Two letters only, so that texts overlap, contain and follow each other."""
    ids = [draw % len(pieces) for draw in draws]
    found = hits(text_automaton([stops], Pieces(tuple(pieces)).table()), ids)
    text = ""
    for token, hit in zip(ids, found, strict=True):
        before, text = len(text), text + pieces[token]
        ends = [
            end
            for end in range(before + 1, len(text) + 1)
            for stop in stops
            if text[:end].endswith(stop)
        ]
        assert hit == bool(ends)


def test_completing_is_what_update_would_find():
    pieces = Pieces(("a", "b", "ab", "ba", "bab", "abab"))
    automaton = text_automaton([["bab", "aa"]], pieces.table())
    for text in ([], [0], [1, 0], [3], [4], [5]):
        state = automaton.init(1)
        for token in text:
            state, _ = automaton.update(state, jnp.array([token]))
        expected = [bool(automaton.update(state, jnp.array([token]))[1][0]) for token in range(6)]
        assert automaton.completing(state)[0].tolist() == expected


def test_rows_may_look_for_different_texts():
    pieces = Pieces(("x", "y", "xy"))
    automaton = text_automaton([["xyx"], [], ["yy", "xyx"], ["xyx"]], pieces.table())
    state = automaton.init(4)
    found = []
    for token in (2, 0, 1, 1):
        state, hit = automaton.update(state, jnp.full(4, token))
        found.append(hit.tolist())
    assert found == [
        [False, False, False, False],
        [True, False, True, True],
        [False, False, False, False],
        [False, False, True, False],
    ]


def test_reading_rows_of_unequal_length():
    pieces = Pieces(("x", "y", "z"))
    automaton = text_automaton([["xyz"]], pieces.table())
    tokens = jnp.array([[0, 1, 0, 1], [0, 1, 2, 0], [2, 2, 2, 2]])
    state = automaton.read(automaton.init(3), tokens, jnp.array([4, 2, 0]))
    assert automaton.update(state, jnp.array([2, 2, 2]))[1].tolist() == [True, True, False]


def test_it_runs_in_a_loop(tables: dict[str, PieceTable]):
    """And other texts of about the same length do not compile again."""

    @jax.jit
    def first_hit(automaton: TextAutomaton, tokens: jax.Array) -> jax.Array:
        def body(carry):
            index, state, _ = carry
            return index + 1, *automaton.update(state, tokens[:, index])

        start = (0, automaton.init(1), jnp.zeros(1, bool))
        return jax.lax.while_loop(
            lambda carry: ~carry[2][0] & (carry[0] < tokens.shape[1]), body, start
        )[0]

    tokens = jnp.array([BYTES.encode("a text with an end")])
    for stop, place in [("ex", 5), ("with", 11), ("é", 18)]:
        automaton = text_automaton([[stop]], tables["bytes"])
        assert automaton.transitions.shape[0] == MIN_STATES
        assert first_hit(automaton, tokens) == place
    assert first_hit._cache_size() == 1


def test_the_model_may_have_more_tokens_than_the_tokenizer():
    table = piece_table(BYTES, 300)
    assert table.sizes.tolist() == [0] * 3 + [1] * 256 + [0] * 41
    automaton = text_automaton([["ab"]], table)
    assert hits(automaton, [*BYTES.encode("a"), 299, *BYTES.encode("b")])[-1]


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["a", ""], "'' cannot be looked for"),
        (["a\ufffd"], "not U\\+FFFD"),
        (["x" * 5000], "have 5001 bytes, more than 4096"),
    ],
)
def test_texts_that_cannot_be_found_are_errors(tables, texts: list[str], message: str):
    with pytest.raises(UserError, match=message):
        text_automaton([texts], tables["bytes"])
