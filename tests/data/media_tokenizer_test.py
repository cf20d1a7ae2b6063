"""Markers around media: ids of their own, never made from plain text."""

import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatransformer_jax.config.option import UserError
from megatransformer_jax.data.media_tokenizer import MARKERS, MediaTokenizer
from megatransformer_jax.data.tokenizer import BytesTokenizer, Tokenizer
from megatransformer_jax.types import AUDIO, IMAGE, NO_MEDIUM

BASE = BytesTokenizer()
TOKENIZER = MediaTokenizer(BASE)


def test_it_is_a_tokenizer_with_six_more_ids() -> None:
    assert isinstance(TOKENIZER, Tokenizer)
    assert TOKENIZER.vocab_size == BASE.vocab_size + 6
    assert [TOKENIZER.marker_id(marker) for marker in MARKERS] == list(range(259, 265))
    assert (TOKENIZER.pad_id, TOKENIZER.bos_id, TOKENIZER.eos_id) == (0, 1, 2)
    assert TOKENIZER.digest() != BASE.digest()
    assert pickle.loads(pickle.dumps(TOKENIZER)) == TOKENIZER


def test_media_come_after_opening_tokens_only() -> None:
    media = {marker: TOKENIZER.medium_after(TOKENIZER.marker_id(marker)) for marker in MARKERS}
    assert media == {
        "<|AUDIO|>": AUDIO,
        "<|/AUDIO|>": NO_MEDIUM,
        "<|IMAGE|>": IMAGE,
        "<|/IMAGE|>": NO_MEDIUM,
        "<|VOICE|>": AUDIO,
        "<|/VOICE|>": NO_MEDIUM,
    }
    assert TOKENIZER.medium_after(70) == NO_MEDIUM
    for marker in ("AUDIO", "IMAGE", "VOICE"):
        closing = TOKENIZER.closing_id(TOKENIZER.marker_id(f"<|{marker}|>"))
        assert closing == TOKENIZER.marker_id(f"<|/{marker}|>")
    with pytest.raises(ValueError, match="70 is not an opening token"):
        TOKENIZER.closing_id(70)


@given(st.lists(st.one_of(st.text(max_size=4), st.sampled_from(MARKERS)), max_size=6))
def test_plain_text_never_becomes_a_marker(parts: list[str]) -> None:
    text = "".join(parts)
    ids = TOKENIZER.encode(text)
    assert all(token < BASE.vocab_size for token in ids)
    assert TOKENIZER.decode(ids) == TOKENIZER.decode_with_media(ids) == text


def test_markers_of_a_prompt_are_tokens_and_come_back() -> None:
    prompt = "see <|IMAGE|><|/IMAGE|> and hear é<|VOICE|><|/VOICE|>, then <|AUDIO|>"
    ids = TOKENIZER.encode_with_media(prompt)
    assert [TOKENIZER.marker_of(token) for token in ids if token >= 259] == [
        "<|IMAGE|>",
        "<|/IMAGE|>",
        "<|VOICE|>",
        "<|/VOICE|>",
        "<|AUDIO|>",
    ]
    assert TOKENIZER.decode_with_media(ids) == prompt
    assert TOKENIZER.decode(ids) == "see  and hear é, then "
    assert b"".join(map(TOKENIZER.piece_bytes, ids)).decode() == TOKENIZER.decode(ids)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("a <|/IMAGE|>", "closes nothing; write <|IMAGE|><|/IMAGE|>"),
        ("<|IMAGE|> a", "after <|IMAGE|> stands ' a'"),
        ("<|IMAGE|><|/AUDIO|>", "after <|IMAGE|> stands '<|/AUDIO|>'"),
        ("<|IMAGE|><|IMAGE|>", "after <|IMAGE|> stands '<|IMAGE|>'"),
    ],
)
def test_markers_that_do_not_pair_are_an_error(prompt: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        TOKENIZER.encode_with_media(prompt)
    assert message in str(caught.value)
