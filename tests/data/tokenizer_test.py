"""Tokenizers lose nothing, are the same every time, and say what is wrong with their input."""

import dataclasses
import os
import pathlib
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatransformer_jax.config.data import DataConfig, TokenizerConfig
from megatransformer_jax.config.option import UserError
from megatransformer_jax.data.sources import BadRecordError, training_texts
from megatransformer_jax.data.tokenizer import (
    BytesTokenizer,
    SentencePieceTokenizer,
    build_tokenizer,
    load_sentencepiece,
    train_sentencepiece,
)

SMALL = TokenizerConfig(vocab_size=400)
TEXTS = list(training_texts(DataConfig()))[:12]
TRAINED_ON = {"data.seed": 0, "training data": "12 records"}


@pytest.fixture(scope="module")
def trained() -> SentencePieceTokenizer:
    return SentencePieceTokenizer(train_sentencepiece(SMALL, TEXTS))


# U+2581 stands for a blank inside SentencePiece, as the module documents.
texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\u2581"))


@given(texts)
def test_every_text_comes_back(trained: SentencePieceTokenizer, text: str):
    for tokenizer in (trained, BytesTokenizer()):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert all(0 <= token < tokenizer.vocab_size for token in ids)
        assert not {tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id} & set(ids)


@pytest.mark.parametrize("text", ["😀", "汉字", "</s> <s>\n\n\tx  \r\n", " \0", "é"])
def test_what_the_vocabulary_lacks_is_spelt_in_bytes(trained: SentencePieceTokenizer, text: str):
    assert trained.decode(trained.encode(text)) == text
    assert len(trained.encode("😀")) == 4


def test_special_tokens_decode_to_nothing(trained: SentencePieceTokenizer):
    for tokenizer in (trained, BytesTokenizer()):
        special = [tokenizer.bos_id, *tokenizer.encode("a b"), tokenizer.eos_id, tokenizer.pad_id]
        assert tokenizer.decode(special) == "a b"


@given(st.data())
def test_the_bytes_of_pieces_make_up_the_text(trained: SentencePieceTokenizer, data: st.DataObject):
    for tokenizer in (trained, BytesTokenizer()):
        ids: list[int] = []
        for token in data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1))):
            # A special token after an unfinished character would take it apart.
            is_special = not tokenizer.piece_bytes(token)
            if not (is_special and ids and tokenizer.piece_bytes(ids[-1])[-1:] >= b"\x80"):
                ids.append(token)
        content = b"".join(tokenizer.piece_bytes(token) for token in ids)
        # How many replacement characters bad bytes become differs between decoders.
        ours, theirs = content.decode("utf-8", "replace"), tokenizer.decode(ids)
        assert ours.split("\ufffd")[0] == theirs.split("\ufffd")[0]
        assert [part for part in ours.split("\ufffd") if part] == [
            part for part in theirs.split("\ufffd") if part
        ]


def test_bytes_of_single_pieces(trained: SentencePieceTokenizer):
    for tokenizer in (trained, BytesTokenizer()):
        for token in (tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id):
            assert tokenizer.piece_bytes(token) == b""
        for text in ("\n", " ", "é"):
            pieces = map(tokenizer.piece_bytes, tokenizer.encode(text))
            assert b"".join(pieces) == text.encode()
        for token in (-1, tokenizer.vocab_size):
            with pytest.raises(
                ValueError, match=f"{token} is not an id of this tokenizer; it has 0 t"
            ):
                tokenizer.piece_bytes(token)
    assert trained.piece_bytes(trained.encode(" the")[0]).startswith(b" ")


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
def test_training_is_deterministic(model_type: str):
    config = dataclasses.replace(SMALL, model_type=model_type)
    assert train_sentencepiece(config, TEXTS) == train_sentencepiece(config, iter(TEXTS))


def test_a_long_line_is_not_lost():
    line = "zyzzyva quokka " * 5000
    tokenizer = SentencePieceTokenizer(train_sentencepiece(SMALL, [*TEXTS[:3], line]))
    assert len(tokenizer.encode(" zyzzyva")) == 1


def test_training_text_is_limited():
    config = TokenizerConfig(vocab_size=320, max_training_bytes=1000)
    text = [TEXTS[0], "qxqxqxqxqx " * 1000]
    assert train_sentencepiece(config, text) == train_sentencepiece(config, text[:1])


def test_a_run_trains_once_and_then_loads(tmp_path: pathlib.Path):
    path = tmp_path / "new" / "tokenizer.model"
    first = build_tokenizer(SMALL, TEXTS, path, TRAINED_ON)
    assert first.vocab_size == 400
    unread = (_ for _ in "x" if pytest.fail("read the texts again"))
    again = build_tokenizer(SMALL, unread, path, TRAINED_ON)
    assert first.digest() == again.digest()
    assert sorted(file.name for file in path.parent.iterdir()) == [
        "tokenizer.json",
        "tokenizer.model",
    ]


@pytest.mark.parametrize(
    ("options", "trained_on", "message"),
    [
        ({"vocab_size": 500}, {}, r"data.tokenizer.vocab_size: then 400, now 500"),
        ({"model_type": "unigram"}, {}, r"data.tokenizer.model_type: then 'bpe', now 'unigram'"),
        ({"character_coverage": 0.9}, {}, r"character_coverage: then 0.9995, now 0.9"),
        ({"max_training_bytes": 9}, {}, r"max_training_bytes: then 50000000, now 9"),
        ({}, {"data.seed": 1}, r"data.seed: then 0, now 1"),
        ({}, {"training data": "13 records"}, r"training data: then '12 records', now '13 rec"),
    ],
)
def test_a_stored_model_of_other_options_or_texts_is_an_error(
    options: dict, trained_on: dict, message: str, tmp_path: pathlib.Path
):
    path = tmp_path / "tokenizer.model"
    build_tokenizer(SMALL, TEXTS, path, TRAINED_ON)
    changed = dataclasses.replace(SMALL, **options)
    with pytest.raises(UserError, match=message) as error:
        build_tokenizer(changed, TEXTS, path, TRAINED_ON | trained_on)
    assert f"use another workdir, or delete {path}" in str(error.value)
    assert str(error.value).count(": then ") == 1


def test_a_crash_between_the_two_files_leaves_nothing_stale(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
):
    path = tmp_path / "tokenizer.model"
    replace = os.replace

    def crash_at_the_model(source, target):
        if pathlib.Path(target) == path:
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", crash_at_the_model)
    with pytest.raises(KeyboardInterrupt):
        build_tokenizer(SMALL, TEXTS, path, TRAINED_ON)
    monkeypatch.undo()
    changed = dataclasses.replace(SMALL, vocab_size=420)
    assert build_tokenizer(changed, TEXTS, path, TRAINED_ON).vocab_size == 420
    assert build_tokenizer(changed, [], path, TRAINED_ON).vocab_size == 420


def test_a_model_without_its_description_or_of_another_is_an_error(
    tmp_path: pathlib.Path, trained: SentencePieceTokenizer
):
    path = tmp_path / "tokenizer.model"
    path.write_bytes(trained.model)
    with pytest.raises(UserError, match=r"no readable tokenizer.json next to it"):
        build_tokenizer(SMALL, TEXTS, path, TRAINED_ON)
    path.unlink()
    build_tokenizer(SMALL, TEXTS, path, TRAINED_ON)
    path.write_bytes(train_sentencepiece(SMALL, TEXTS[1:]))
    with pytest.raises(UserError, match=r"sha256 of the model: then "):
        build_tokenizer(SMALL, TEXTS, path, TRAINED_ON)


def test_an_error_of_the_texts_comes_through():
    def texts():
        yield TEXTS[0]
        raise BadRecordError("a.jsonl, line 3: not valid JSON")

    with pytest.raises(BadRecordError) as error:
        train_sentencepiece(SMALL, texts())
    assert str(error.value) == "a.jsonl, line 3: not valid JSON"


def test_the_model_decides_the_size_if_none_is_given():
    assert TokenizerConfig().with_vocab_size(512).vocab_size == 512
    assert TokenizerConfig(vocab_size=400).with_vocab_size(512).vocab_size == 400
    assert TokenizerConfig(kind="bytes").with_vocab_size(512) == TokenizerConfig(kind="bytes")
    with pytest.raises(UserError, match=r"data.tokenizer.vocab_size: None stands for"):
        train_sentencepiece(TokenizerConfig(), TEXTS)


def test_a_model_file_is_loaded(tmp_path: pathlib.Path, trained: SentencePieceTokenizer):
    path = tmp_path / "mine.model"
    path.write_bytes(trained.model)
    config = TokenizerConfig(model_file=str(path))
    assert build_tokenizer(config, [], tmp_path / "unused", {}).digest() == trained.digest()
    assert not (tmp_path / "unused").exists()


def test_bytes_need_no_file(tmp_path: pathlib.Path):
    tokenizer = build_tokenizer(TokenizerConfig(kind="bytes"), [], tmp_path / "unused", {})
    assert tokenizer.encode("Aé") == [68, 198, 172]
    assert tokenizer.decode([68, 198]) == "A\ufffd"
    assert not (tmp_path / "unused").exists()


def test_tokenizers_pickle(trained: SentencePieceTokenizer):
    for tokenizer in (trained, BytesTokenizer()):
        copy = pickle.loads(pickle.dumps(tokenizer))
        assert copy.encode("some text") == tokenizer.encode("some text")
        assert copy.digest() == tokenizer.digest()


@pytest.mark.parametrize(
    ("vocab_size", "texts", "message"),
    [
        (2000, ["only a few words"], r"2000 is more than the training text supports; .* at most 2"),
        (300, ["".join(map(chr, range(0x4E00, 0x4F00)))], r"300 is less than the 516"),
        (300, ["", "\n"], r"the training split holds no text"),
    ],
)
def test_a_size_that_does_not_fit_the_text_is_an_error(
    vocab_size: int, texts: list[str], message: str
):
    with pytest.raises(UserError, match=message):
        train_sentencepiece(TokenizerConfig(vocab_size=vocab_size), texts)


def test_a_file_that_is_no_model_is_an_error(tmp_path: pathlib.Path):
    with pytest.raises(UserError, match=r"none.model: cannot read the SentencePiece model"):
        load_sentencepiece(tmp_path / "none.model")
    (tmp_path / "bad.model").write_bytes(b"not a model")
    with pytest.raises(UserError, match=r"bad.model: not a SentencePiece model"):
        load_sentencepiece(tmp_path / "bad.model")
