"""The tokenizer that a run starts with."""

import shutil

import jax
import pytest

from megatransformer_jax.config.build import build
from megatransformer_jax.config.option import ConfigError
from megatransformer_jax.runs import tokenizers


@pytest.fixture
def config(small_run, tmp_path):
    data = {"tokenizer": {"kind": "sentencepiece", "max_training_bytes": 30_000}}
    return build(small_run(tmp_path, {"model": {"vocab_size": 350}, "data": data}))


def test_only_process_0_trains_and_the_others_read_what_it_wrote(config, tmp_path, monkeypatch):
    events = []
    texts = tokenizers.training_texts

    def opened(data):
        events.append("reads texts")
        yield from texts(data)

    monkeypatch.setattr(tokenizers, "training_texts", opened)
    monkeypatch.setattr(tokenizers, "wait_for_all", events.append)
    first = tokenizers.start_tokenizer(config, tmp_path)
    assert events == ["reads texts", "tokenizer"]

    def trained_by_another(name: str) -> None:
        events.append(name)
        for file in ("tokenizer.json", "tokenizer.model"):
            shutil.copy(tmp_path / file, tmp_path / "late")

    (tmp_path / "late").mkdir()
    events.clear()
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    monkeypatch.setattr(tokenizers, "wait_for_all", trained_by_another)
    second = tokenizers.start_tokenizer(config, tmp_path / "late")
    assert events == ["tokenizer"] and second.digest() == first.digest()


def test_a_failure_of_process_0_does_not_let_the_others_wait(config, tmp_path, monkeypatch):
    waits = []
    monkeypatch.setattr(tokenizers, "wait_for_all", waits.append)
    monkeypatch.setattr(tokenizers, "training_texts", lambda data: iter(["a short text"]))
    for index in (0, 1):
        monkeypatch.setattr(jax, "process_index", lambda index=index: index)
        with pytest.raises(ConfigError, match=r"data.tokenizer.vocab_size: 350 is more than"):
            tokenizers.start_tokenizer(config, tmp_path)
    assert waits == ["tokenizer"] * 2
