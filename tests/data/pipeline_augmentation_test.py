"""Augmented batches: which split, how often, and the same however they are made."""

import dataclasses
import itertools
import json
import pathlib
import sys

import numpy as np
import pytest

from megatransformer_jax.config.data import AugmentationConfig, DataConfig, TokenizerConfig
from megatransformer_jax.config.option import ConfigError, UserError
from megatransformer_jax.data.fingerprint import data_fingerprint, training_text_identity
from megatransformer_jax.data.pipeline import build_pipeline, validation_batches
from megatransformer_jax.data.sources import training_texts
from megatransformer_jax.data.tokenizer import BytesTokenizer
from megatransformer_jax.types import Batch

TOKENIZER = BytesTokenizer()
DOCUMENTS = 40
WORDS = 25


@pytest.fixture
def plain(tmp_path: pathlib.Path) -> DataConfig:
    path = tmp_path / "a.jsonl"
    lines = [json.dumps({"text": "big " * WORDS + str(n)}) for n in range(DOCUMENTS)]
    path.write_text("\n".join(lines))
    (tmp_path / "words.tsv").write_text("big\thuge,fine\n")
    return DataConfig(
        source="jsonl",
        files=(str(path),),
        validation_files=(str(path),),
        packing="pad",
        tokenizer=TokenizerConfig(kind="bytes"),
        batch_size=4,
        sequence_length=160,
        prefetch_batches=0,
    )


@pytest.fixture
def everything(plain: DataConfig, tmp_path: pathlib.Path, monkeypatch) -> DataConfig:
    """All augmentations at once."""
    (tmp_path / "user_translation.py").write_text(
        "def translate(text, seed):\n    return f'{text} {seed % 10}'\n"
        "def fail(text, seed):\n    return ''\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "user_translation", raising=False)
    return dataclasses.replace(
        plain,
        augmentation=AugmentationConfig(
            token_dropout=0.2,
            synonyms_file=str(tmp_path / "words.tsv"),
            synonym_rate=0.4,
            back_translation="user_translation:translate",
            back_translation_rate=0.5,
        ),
    )


def train(config: DataConfig, count: int, **share) -> list[Batch]:
    with build_pipeline(config, TOKENIZER, split="train", **share) as batches:
        return list(itertools.islice(batches, count))


def predicted_texts(batches: list[Batch]) -> list[str]:
    return [TOKENIZER.decode(row.tolist()) for batch in batches for row in batch.targets]


def assert_equal(one: list[Batch], other: list[Batch]) -> None:
    assert len(one) == len(other)
    for left, right in zip(one, other, strict=True):
        for left_part, right_part in zip(left, right, strict=True):
            np.testing.assert_array_equal(left_part, right_part)


def with_options(config: DataConfig, **options) -> DataConfig:
    return dataclasses.replace(config, augmentation=AugmentationConfig(**options))


def test_synonyms_come_at_their_rate_and_anew_each_epoch(plain: DataConfig, tmp_path: pathlib.Path):
    rate = 0.4
    config = with_options(plain, synonyms_file=str(tmp_path / "words.tsv"), synonym_rate=rate)
    texts = predicted_texts(train(config, 2 * DOCUMENTS // 4))
    words = [word for text in texts for word in text.split()[:WORDS]]
    assert set(words) == {"big", "huge", "fine"}
    share = 1 - words.count("big") / len(words)
    assert abs(share - rate) < 5 * np.sqrt(rate * (1 - rate) / len(words))
    by_epoch = [
        {text.split()[-1]: text for text in texts[start : start + DOCUMENTS]}
        for start in (0, DOCUMENTS)
    ]
    assert by_epoch[0].keys() == by_epoch[1].keys() and len(by_epoch[0]) == DOCUMENTS
    assert sum(by_epoch[0][name] != by_epoch[1][name] for name in by_epoch[0]) > DOCUMENTS / 2


def test_back_translation_comes_at_its_rate(everything: DataConfig):
    config = with_options(
        everything, back_translation="user_translation:translate", back_translation_rate=0.5
    )
    texts = predicted_texts(train(config, 100))
    translated = [text for text in texts if len(text.split()) == WORDS + 2]
    assert len({text.split()[-1] for text in translated}) > 5  # Seeds differ.
    assert abs(len(translated) / len(texts) - 0.5) < 5 * np.sqrt(0.25 / len(texts))


def test_token_dropout_hides_tokens_of_documents_only(plain: DataConfig):
    rate = 0.2
    hidden, whole = train(with_options(plain, token_dropout=rate), 5), train(plain, 5)
    changed = count = 0
    for one, other in zip(hidden, whole, strict=True):
        for name in ("targets", "loss_mask", "segment_ids", "positions"):
            np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
        differs = one.tokens != other.tokens
        assert (one.tokens[differs] == TOKENIZER.pad_id).all()
        can_change = (other.segment_ids > 0) & (other.tokens != TOKENIZER.bos_id)
        assert not differs[~can_change].any()
        changed, count = changed + differs.sum(), count + can_change.sum()
    assert abs(changed / count - rate) < 5 * np.sqrt(rate * (1 - rate) / count)


@pytest.mark.parametrize("packing", ["pack", "pad", "bucket"])
def test_batches_do_not_depend_on_how_they_are_made(everything: DataConfig, packing: str):
    config = dataclasses.replace(everything, packing=packing)
    whole = train(config, 8)
    shares = [train(config, 8, process_index=index, process_count=2) for index in range(2)]
    assert_equal(
        [
            Batch(*map(np.concatenate, list(zip(*pair, strict=True))[:-1]))
            for pair in zip(*shares, strict=True)
        ],
        whole,
    )
    with build_pipeline(config, TOKENIZER, split="train") as batches:
        for _ in range(3):
            next(batches)
        state = batches.get_state()
    with build_pipeline(config, TOKENIZER, split="train") as batches:
        batches.set_state(state)
        assert_equal(list(itertools.islice(batches, 5)), whole[3:])


def test_workers_do_not_change_augmented_batches(everything: DataConfig):
    workers = dataclasses.replace(everything, num_workers=1)
    assert_equal(train(workers, 4), train(everything, 4))


def test_other_data_stays_as_it_is(everything: DataConfig, plain: DataConfig):
    assert_equal(validation_batches(everything, TOKENIZER), validation_batches(plain, TOKENIZER))
    assert list(training_texts(everything)) == list(training_texts(plain))
    assert training_text_identity(everything) == training_text_identity(plain)
    assert_equal(train(with_options(plain), 3), train(plain, 3))


def test_the_seed_decides(everything: DataConfig):
    config = dataclasses.replace(everything, shuffle=False)
    one, other = (train(dataclasses.replace(config, seed=seed), 2) for seed in (0, 1))
    assert predicted_texts(one) != predicted_texts(other)


def test_the_fingerprint_has_the_synonyms(everything: DataConfig, plain: DataConfig, tmp_path):
    before = data_fingerprint(everything)
    assert before.startswith(f"{data_fingerprint(plain)}; synonyms: 1 files")
    (tmp_path / "words.tsv").write_text("big\thuge,vast\n")
    assert data_fingerprint(everything) != before
    (tmp_path / "words.tsv").unlink()
    with pytest.raises(ConfigError, match="synonyms_file"):
        data_fingerprint(everything)


def test_a_function_that_fails_ends_the_run(everything: DataConfig):
    config = with_options(
        everything, back_translation="user_translation:fail", back_translation_rate=1.0
    )
    with pytest.raises(UserError, match=r"user_translation:fail returned an empty text, for docu"):
        train(config, 1)


def test_what_cannot_be_used_is_an_error_at_the_start(plain: DataConfig):
    for options in (
        {"synonyms_file": "/no/such", "synonym_rate": 0.1},
        {"back_translation": "no_such_module:f", "back_translation_rate": 0.1},
    ):
        with pytest.raises(ConfigError, match=r"^data\.augmentation\."):
            build_pipeline(with_options(plain, **options), TOKENIZER, split="train")
