"""Text of new tokens, at once and piece by piece."""

import io
from typing import ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sentencepiece import SentencePieceTrainer
from tiny_model import Pieces

from megatransformer_jax.data.tokenizer import BytesTokenizer, SentencePieceTokenizer
from megatransformer_jax.generation.endings import cut_at_stop
from megatransformer_jax.generation.request import TextStream, continuation_text

BYTES, PIECES = BytesTokenizer(), Pieces()


@pytest.fixture(scope="module")
def sentencepiece():
    """As Llama's: it writes a blank before a text, and `decode` drops one there."""
    model = io.BytesIO()
    SentencePieceTrainer.Train(
        sentence_iterator=iter(["once upon a time", "upon a time once"]),
        model_writer=model,
        vocab_size=290,
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return SentencePieceTokenizer(model.getvalue())


def streamed(tokenizer, prompt, new, stops=()):
    """The pieces of text, one per token."""
    stream = TextStream(tokenizer, prompt, stops)
    return [stream.add(token, index == len(new) - 1) for index, token in enumerate(new)]


def test_a_blank_between_prompt_and_continuation_stays(sentencepiece):
    prompt = [sentencepiece.bos_id, *sentencepiece.encode("once upon")]
    new = sentencepiece.encode("a time")
    assert sentencepiece.piece_bytes(new[0]).startswith(b" ")
    assert continuation_text(sentencepiece, prompt, new) == " a time"
    assert "".join(streamed(sentencepiece, prompt, new)) == " a time"


def test_start_and_end_tokens_have_no_text():
    prompt = [BYTES.bos_id, *BYTES.encode("ab")]
    assert continuation_text(BYTES, prompt, BYTES.encode("cd")) == "cd"
    assert continuation_text(BYTES, [BYTES.bos_id], [BYTES.bos_id, *BYTES.encode("x")]) == "x"
    assert continuation_text(BYTES, prompt, []) == ""


def test_characters_are_shown_when_they_are_complete():
    euro = "\u20ac".encode()
    new = [3 + byte for byte in b"a" + euro + b"b" + euro[:2]]
    pieces = streamed(BYTES, [BYTES.bos_id], new)
    assert pieces == ["a", "", "", "\u20ac", "b", "", "\ufffd"]
    # Bytes that are not text are shown once something else follows.
    assert streamed(BYTES, [1], [3 + 0xFF, 3 + ord("a")]) == ["", "\ufffda"]


def test_a_character_that_the_prompt_has_begun():
    """Nothing can be told apart there, but nothing is lost behind it."""
    euro = BYTES.encode("\u20ac")
    new = [*euro[1:], *BYTES.encode("abc")]
    assert continuation_text(BYTES, [1, euro[0]], new).endswith("abc")
    assert "".join(streamed(BYTES, [1, euro[0]], new)) == continuation_text(
        BYTES, [1, euro[0]], new
    )


def test_what_may_become_a_stop_is_held_back():
    stops = ("\nUser:", " User:")
    pieces = streamed(BYTES, [1], BYTES.encode("a User Us"), stops)
    assert pieces == ["a", "", "", "", "", "", " User", "", " Us"]
    # The one that completes the stop shows nothing of it.
    pieces = streamed(BYTES, [1], BYTES.encode("ab\nUser:"), stops)
    assert pieces == ["a", "b", "", "", "", "", "", ""]


@st.composite
def token_sequences(draw):
    tokenizer = draw(st.sampled_from([PIECES, BYTES]))
    ids = st.integers(3, tokenizer.vocab_size - 1)
    if tokenizer is BYTES:
        few = [3 + byte for byte in b"ab\n" + "\u20ac\u00e9\U0001f600".encode() + b"\xff"]
        ids = st.sampled_from(few)
    sequence = st.lists(ids, max_size=60)
    return tokenizer, [1, *draw(st.lists(ids, max_size=40))], draw(sequence)


@given(
    token_sequences(),
    st.lists(st.sampled_from(["ab", "abc", "b a", "\u20ac", "\n\n", "a\u00e9", "c"]), max_size=3),
)
def test_pieces_make_up_the_text(sequence, stops):
    tokenizer, prompt, new = sequence
    whole = continuation_text(tokenizer, prompt, new)
    # Generation ends in the token that completes a stop.
    for size in range(1, len(new) + 1):
        text = continuation_text(tokenizer, prompt, new[:size])
        if cut_at_stop(text, stops) != text:
            new, whole = new[:size], cut_at_stop(text, stops)
            break
    pieces = streamed(tokenizer, prompt, new, stops)
    assert "".join(pieces) == whole
    # A stop is never shown, not even for a moment.
    shown = ""
    for piece in pieces:
        shown += piece
        assert not any(stop in shown for stop in stops)


@given(st.data())
def test_pieces_of_sentencepiece_make_up_the_text(sentencepiece, data):
    every = range(1, sentencepiece.vocab_size)
    blanks = [token for token in every if sentencepiece.piece_bytes(token) == b" "]
    some = st.sampled_from(every) | st.sampled_from(blanks)
    ids = st.lists(some, max_size=60)
    prompt, new = [sentencepiece.bos_id, *data.draw(ids)], data.draw(ids)
    pieces = streamed(sentencepiece, prompt, new)
    assert "".join(pieces) == continuation_text(sentencepiece, prompt, new)


class Counting(BytesTokenizer):
    """Notes how many ids are decoded at once."""

    sizes: ClassVar[list[int]] = []

    def decode(self, ids):
        self.sizes.append(len(ids))
        return super().decode(ids)


def test_a_token_costs_the_same_wherever_it_stands():
    tokenizer = Counting()
    prompt, new = tokenizer.encode("x" * 300), tokenizer.encode("once \u20ac " * 100)
    stream = TextStream(tokenizer, prompt, ("\nUser:",))
    tokenizer.sizes.clear()
    pieces = [stream.add(token, index == len(new) - 1) for index, token in enumerate(new)]
    assert "".join(pieces) == "once \u20ac " * 100
    # Before and with the new ones, and once more when they are settled.
    assert max(tokenizer.sizes) < 40
    assert len(tokenizer.sizes) < 2.2 * len(new)
