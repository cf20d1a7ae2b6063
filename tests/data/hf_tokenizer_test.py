"""tokenizer.json of published models, and the tasks' symbols, serve as tokenizers."""

import dataclasses
import json
import pickle
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatransformer_jax.config.option import UserError
from megatransformer_jax.data.hf_tokenizer import load_huggingface_tokenizer
from megatransformer_jax.data.tokenizer import Tokenizer
from megatransformer_jax.generation.request import encode_prompts

tokenizers = pytest.importorskip("tokenizers")

SPECIAL = ["<|begin_text|>", "<|end_text|>", "<|end_turn|>", "<|pad|>"]
TEXTS = ["the quick brown fox", "the lazy dog, the lazy fox"] * 3


def byte_level() -> "tokenizers.Tokenizer":
    """As Huginn's: byte-level BPE, special tokens behind the others."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=270,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.add_tokens(["<answer>"])
    return tokenizer


def like_sentencepiece() -> "tokenizers.Tokenizer":
    """As Llama's: blanks as U+2581, and bytes for what the vocabulary lacks."""
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", *"abc", *SPECIAL]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True)
    )
    tokenizer.normalizer = tokenizers.normalizers.Replace(" ", "\u2581")
    decoders = tokenizers.decoders
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer.add_special_tokens(SPECIAL)
    return tokenizer


def write_folder(folder, tokenizer, **files):
    """A folder with tokenizer.json and other JSON files by their stems."""
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    for stem, values in files.items():
        (folder / f"{stem}.json").write_text(json.dumps(values))
    return folder


NAMED = {
    "bos_token": "<|begin_text|>",
    "eos_token": {"content": "<|end_text|>", "lstrip": False},
    "pad_token": "<|pad|>",
}


@pytest.fixture(scope="module")
def huginn_like(tmp_path_factory):
    folder = write_folder(
        tmp_path_factory.mktemp("tokenizer"), byte_level(), tokenizer_config=NAMED
    )
    return load_huggingface_tokenizer(folder)


@pytest.fixture(scope="module")
def llama_like(tmp_path_factory):
    folder = write_folder(
        tmp_path_factory.mktemp("tokenizer"), like_sentencepiece(), special_tokens_map=NAMED
    )
    return load_huggingface_tokenizer(folder)


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_every_text_comes_back(huginn_like, text):
    ids = huginn_like.encode(text)
    assert huginn_like.decode(ids) == text
    assert all(0 <= token < huginn_like.vocab_size for token in ids)


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_the_bytes_of_the_pieces_are_the_texts(huginn_like, llama_like, text):
    for tokenizer in (huginn_like, llama_like):
        pieces = [tokenizer.piece_bytes(token) for token in tokenizer.encode(text)]
        if tokenizer is huginn_like or "\u2581" not in text:
            assert b"".join(pieces) == text.encode()


def test_a_piece_may_be_a_part_of_a_character(huginn_like, llama_like):
    for tokenizer in (huginn_like, llama_like):
        assert len(tokenizer.encode("😀")) == 4
        assert [len(tokenizer.piece_bytes(token)) for token in tokenizer.encode("😀")] == [1] * 4


def test_special_tokens_are_read_but_not_written(huginn_like):
    ids = huginn_like.encode("fox<|end_turn|><answer>")
    assert huginn_like.bos_id not in ids
    assert huginn_like.decode(ids) == "fox<answer>"
    assert [huginn_like.piece_bytes(token) for token in ids[-2:]] == [b"", b"<answer>"]
    special = [huginn_like.bos_id, huginn_like.eos_id, huginn_like.pad_id]
    assert huginn_like.decode(special) == ""
    assert huginn_like.piece_bytes(10**6) == b""


def test_it_is_a_tokenizer_and_pickles(huginn_like):
    assert isinstance(huginn_like, Tokenizer)
    copy = pickle.loads(pickle.dumps(huginn_like))
    assert copy == huginn_like and copy.digest() == huginn_like.digest()
    assert copy.encode("the fox") == huginn_like.encode("the fox")


def test_the_size_counts_the_largest_id(huginn_like):
    # Letters that the training text lacks are in as bytes; then 4 special ones and <answer>.
    assert huginn_like.vocab_size == 270 + 5
    assert huginn_like.encode("<answer>") == [274]


def test_special_tokens_by_name_and_by_id(tmp_path):
    ids = {"bos_token_id": 270, "eos_token_id": [271, 272]}
    folder = write_folder(tmp_path / "ids", byte_level(), config=ids)
    tokenizer = load_huggingface_tokenizer(folder)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.end_ids) == (270, 271, (271, 272))
    assert tokenizer.pad_id == tokenizer.eos_id
    # Names before ids; ids that end a text are added up.
    both = {"eos_token_id": [272, 271], "bos_token_id": 3}
    folder = write_folder(
        tmp_path / "both", byte_level(), tokenizer_config=NAMED, generation_config=both
    )
    tokenizer = load_huggingface_tokenizer(folder)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (270, 271, 273)
    assert tokenizer.end_ids == (271, 272)


def test_a_model_may_read_texts_without_a_start_token(tmp_path):
    files = {"tokenizer_config": NAMED | {"add_bos_token": False}}
    qwen_like = load_huggingface_tokenizer(write_folder(tmp_path / "a", byte_level(), **files))
    assert qwen_like.bos_id == 270 and not qwen_like.begins_texts
    assert encode_prompts(["the fox"], qwen_like, 275) == [qwen_like.encode("the fox")]
    # Documents are kept apart by the end token if no start token is named.
    files = {"config": {"eos_token_id": 271}}
    nameless = load_huggingface_tokenizer(write_folder(tmp_path / "b", byte_level(), **files))
    assert nameless.bos_id == 271 and not nameless.begins_texts


def test_chats_and_their_templates_are_saved(tmp_path):
    template = "{{ bos_token }}{% for m in messages %}{{ m.content }}<|end_turn|>{% endfor %}"
    files = {"tokenizer_config": NAMED | {"chat_template": template, "add_bos_token": False}}
    loaded = load_huggingface_tokenizer(write_folder(tmp_path / "a", byte_level(), **files))
    text = loaded.apply_chat_template([{"role": "user", "content": "fox"}])
    assert text == "<|begin_text|>fox<|end_turn|>"
    assert loaded.encode(text)[0] == loaded.bos_id
    loaded.save(tmp_path / "b")
    again = load_huggingface_tokenizer(tmp_path / "b")
    assert again.apply_chat_template([{"role": "user", "content": "fox"}]) == text
    assert again.digest() == loaded.digest() and not again.begins_texts
    assert pickle.loads(pickle.dumps(loaded)) == loaded
    # The vocabulary is the same with and without a chat.
    assert dataclasses.replace(loaded, chat=None).digest() == loaded.digest()


def test_a_chat_needs_a_template(huginn_like):
    with pytest.raises(UserError, match=r"no chat template.*put chat_template\.jinja next to"):
        huginn_like.apply_chat_template([{"role": "user", "content": "fox"}])


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, r"no file names the eos token; add 'eos_token_id' to generation_config\.json"),
        ({"config": {"bos_token_id": 1}}, r"no file names the eos token"),
        (
            {"tokenizer_config": {"bos_token": "<s>"}},
            r"tokenizer_config\.json: bos_token is '<s>', which tokenizer\.json does not have",
        ),
        (
            {"config": {"bos_token_id": "one", "eos_token_id": 1}},
            r"config\.json: bos_token_id is 'one'; it must be whole numbers",
        ),
        (
            {"config": {"bos_token_id": 1, "eos_token_id": 500}},
            r"eos_id is 500, but the tokenizer has the ids 0 to 274",
        ),
    ],
)
def test_special_tokens_that_are_missing_or_wrong(tmp_path, files, message):
    folder = write_folder(tmp_path / "model", byte_level(), **files)
    with pytest.raises(UserError, match=message):
        load_huggingface_tokenizer(folder)


@pytest.mark.parametrize("content", ["", "{}", "no json", '{"model": {"type": "other"}}'])
def test_a_broken_file_is_named(tmp_path, content):
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(UserError, match=r"tokenizer\.json: not a tokenizer of the tokenizers lib"):
        load_huggingface_tokenizer(tmp_path)


def test_without_the_library_the_extra_is_named(tmp_path, monkeypatch):
    folder = write_folder(tmp_path / "model", byte_level())
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(UserError, match=r"pip install 'megatransformer_jax\[hub\]'"):
        load_huggingface_tokenizer(folder)


def test_bytes_of_unknown_decoders_are_an_error(tmp_path):
    words = {"a": 0, "b": 1}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="a"))
    tokenizer.decoder = tokenizers.decoders.WordPiece()
    ids = {"bos_token_id": 0, "eos_token_id": 1}
    loaded = load_huggingface_tokenizer(write_folder(tmp_path / "model", tokenizer, config=ids))
    with pytest.raises(UserError, match="the decoder WordPiece; known: ByteLevel"):
        loaded.piece_bytes(1)
