"""Texts of training rows with media: which of them change, and what stays as it is."""

import dataclasses
import itertools
import pathlib
import sys

import numpy as np
import pytest
from media_formats import FORMATS

from megatransformer_jax.config.data import AugmentationConfig, DataConfig, TokenizerConfig
from megatransformer_jax.config.media_data import AudioDataConfig, MediaDataConfig
from megatransformer_jax.config.option import ConfigError, UserError
from megatransformer_jax.data.fingerprint import data_fingerprint
from megatransformer_jax.data.media.encoding import check_media
from megatransformer_jax.data.media.rows import task_names
from megatransformer_jax.data.media_tokenizer import MediaTokenizer
from megatransformer_jax.data.pipeline import build_pipeline
from megatransformer_jax.data.tokenizer import BytesTokenizer

TOKENIZER = MediaTokenizer(BytesTokenizer())
BATCHES = 3


def config(**augmentation) -> DataConfig:
    return DataConfig(
        source="media",
        tokenizer=TokenizerConfig(kind="bytes"),
        batch_size=10,
        sequence_length=60,
        prefetch_batches=0,
        media=MediaDataConfig(
            tasks=("draw=1", "caption=1", "speak=1", "transcribe=1", "text=1"),
            audio=AudioDataConfig(source="tones", num_tones=40),
        ),
        augmentation=AugmentationConfig(**augmentation),
    )


def batches(config, split="train"):
    with build_pipeline(config, TOKENIZER, split=split, media=FORMATS) as stream:
        return list(itertools.islice(stream, BATCHES))


def by_task(found):
    """What is predicted, by the name of the task."""
    texts = {}
    for batch in found:
        for task, row in zip(batch.media.task, batch.targets, strict=True):
            name = task_names(config())[task]
            texts.setdefault(name, []).append(TOKENIZER.decode(row.tolist()))
    return texts


@pytest.fixture
def words(tmp_path: pathlib.Path) -> dict:
    path = tmp_path / "words.tsv"
    digits = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
    lines = [f"{word}\txyzzy" for word in (*digits, "the", "a", "tone", "low", "high", "of")]
    path.write_text("\n".join(lines))
    return {"synonyms_file": str(path), "synonym_rate": 1.0}


def test_words_change_but_not_those_that_are_heard(words):
    plain, changed = by_task(batches(config())), by_task(batches(config(**words)))
    assert set(plain) == {"draw", "caption", "speak", "transcribe", "text"}
    for name in ("speak", "transcribe"):
        assert changed[name] == plain[name]
    for name in ("draw", "caption"):
        assert all("xyzzy" in text for text in changed[name])
    assert sum("xyzzy" in text for text in changed["text"]) > 1
    held_out = by_task(batches(config(**words), "validation"))
    assert held_out == by_task(batches(config(), "validation"))


def test_an_answer_to_a_question_keeps_its_words(words):
    pathlib.Path(words["synonyms_file"]).write_text("1\txyzzy\n2\txyzzy\n")
    plain = config()
    media = MediaDataConfig(tasks=("which=1",), images_per_row=2)
    changed = dataclasses.replace(config(**words), media=media)
    for ours, theirs in zip(
        batches(changed), batches(dataclasses.replace(plain, media=media)), strict=True
    ):
        np.testing.assert_array_equal(ours.targets, theirs.targets)


def test_tokens_are_hidden_where_they_are_read_alone():
    hidden, shown = batches(config(token_dropout=0.5)), batches(config())
    shares = []
    for ours, theirs in zip(hidden, shown, strict=True):
        np.testing.assert_array_equal(ours.targets, theirs.targets)
        check_media(ours, TOKENIZER)  # Tokens around media are there.
        np.testing.assert_array_equal(ours.tokens[:, 0], TOKENIZER.bos_id)
        differs = ours.tokens != theirs.tokens
        assert np.all(ours.tokens[differs] == TOKENIZER.pad_id)
        is_text = (theirs.segment_ids > 0) & (theirs.tokens < TOKENIZER.marker_id("<|IMAGE|>"))
        shares.append(differs.sum() / (is_text.sum() - len(differs)))
    assert 0.4 < np.mean(shares) < 0.6


def test_a_function_that_fails_ends_the_run_with_its_name(tmp_path, monkeypatch):
    (tmp_path / "user_words.py").write_text("def fail(text, seed):\n    return ''\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "user_words", raising=False)
    broken = config(back_translation="user_words:fail", back_translation_rate=1.0)
    with pytest.raises(UserError, match="user_words:fail returned an empty text"):
        batches(broken)


def test_the_synonyms_are_part_of_the_data(words):
    pathlib.Path(words["synonyms_file"]).write_text("big\thuge\n")
    before = data_fingerprint(config(**words))
    pathlib.Path(words["synonyms_file"]).write_text("big\tlarge\n")
    assert data_fingerprint(config(**words)) != before
    with pytest.raises(ConfigError, match=r"synonyms_file: .* cannot be read"):
        data_fingerprint(config(synonyms_file="missing.tsv", synonym_rate=0.5))
