"""Tokenizers lose nothing, are the same every time, and say what is wrong with their input."""

import dataclasses
import pathlib
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatransformer_jax.config.data import DataConfig, TokenizerConfig
from megatransformer_jax.config.option import UserError
from megatransformer_jax.data.sentencepiece_training import train_sentencepiece
from megatransformer_jax.data.sources import training_texts
from megatransformer_jax.data.tokenizer import (
    BytesTokenizer,
    SentencePieceTokenizer,
    build_tokenizer,
    load_sentencepiece,
)

SMALL = TokenizerConfig(vocab_size=400)
TEXTS = list(training_texts(DataConfig()))[:12]


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
    first = build_tokenizer(SMALL, TEXTS, path)
    assert first.vocab_size == 400
    again = build_tokenizer(SMALL, (_ for _ in "x" if pytest.fail("read the texts again")), path)
    assert first.digest() == again.digest()
    assert [file.name for file in path.parent.iterdir()] == ["tokenizer.model"]


def test_a_model_of_another_size_is_an_error(tmp_path: pathlib.Path):
    path = tmp_path / "tokenizer.model"
    build_tokenizer(SMALL, TEXTS, path)
    with pytest.raises(UserError, match=r"data.tokenizer.vocab_size: 500, but .* has 400 pieces"):
        build_tokenizer(TokenizerConfig(vocab_size=500), TEXTS, path)


def test_a_model_file_is_loaded(tmp_path: pathlib.Path, trained: SentencePieceTokenizer):
    path = tmp_path / "mine.model"
    path.write_bytes(trained.model)
    config = TokenizerConfig(model_file=str(path))
    assert build_tokenizer(config, [], tmp_path / "unused").digest() == trained.digest()
    assert not (tmp_path / "unused").exists()


def test_bytes_need_no_file(tmp_path: pathlib.Path):
    tokenizer = build_tokenizer(TokenizerConfig(kind="bytes"), [], tmp_path / "unused")
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
