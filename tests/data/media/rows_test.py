"""Batches with media: the same in every process and after resuming, tasks by weight."""

import collections
import dataclasses
import json
import pathlib
from typing import Any

import numpy as np
import pytest
from media_formats import FORMATS
from PIL import Image

from megatransformer_jax.config.data import DataConfig, TokenizerConfig
from megatransformer_jax.config.media_data import (
    AudioAugmentationConfig,
    AudioDataConfig,
    ImageAugmentationConfig,
    ImageDataConfig,
    MediaDataConfig,
)
from megatransformer_jax.config.option import UserError
from megatransformer_jax.data.media.encoding import check_media
from megatransformer_jax.data.media.images import WORDS
from megatransformer_jax.data.media.rows import MAX_ATTEMPTS, task_names, validation_rows
from megatransformer_jax.data.media_tokenizer import MediaTokenizer
from megatransformer_jax.data.pipeline import build_pipeline, validation_batches
from megatransformer_jax.data.sources.record import BadRecordError, EmbeddedText
from megatransformer_jax.data.tokenizer import BytesTokenizer
from megatransformer_jax.types import Batch

TOKENIZER = MediaTokenizer(BytesTokenizer())
ALL = ("draw=2", "caption=1", "speak=1", "transcribe=1", "text=1")


def config(**changes: Any) -> DataConfig:
    media = MediaDataConfig(tasks=ALL, audio=AudioDataConfig(source="tones", num_tones=40))
    return DataConfig(
        **{
            "source": "media",
            "tokenizer": TokenizerConfig(kind="bytes"),
            "batch_size": 8,
            "sequence_length": 48,
            "prefetch_batches": 0,
            "media": media,
        }
        | changes
    )


def with_media(base: DataConfig, **changes: Any) -> DataConfig:
    return dataclasses.replace(base, media=dataclasses.replace(base.media, **changes))


def take(settings: DataConfig, count: int, start: int = 0, **processes: int) -> list[Batch]:
    with build_pipeline(settings, TOKENIZER, split="train", media=FORMATS, **processes) as batches:
        batches.set_state({"batch": start})
        return [next(batches) for _ in range(count)]


def leaves(batch: Batch) -> list[np.ndarray]:
    assert batch.media is not None
    return [*batch[:-1], *batch.media]


def assert_same(first: Batch, second: Batch) -> None:
    for one, other in zip(leaves(first), leaves(second), strict=True):
        np.testing.assert_array_equal(one, other)


def text(batch: Batch, row: int) -> str:
    return TOKENIZER.decode_with_media(batch.tokens[row][batch.segment_ids[row] > 0])


@pytest.fixture(scope="module")
def batches() -> list[Batch]:
    return take(config(), 12)


def test_rows_are_what_their_task_says(batches: list[Batch]) -> None:
    names = task_names(config())
    documents = "".join(EmbeddedText()[n] for n in range(len(EmbeddedText())))
    counts: collections.Counter[str] = collections.Counter()
    for batch in batches:
        check_media(batch, TOKENIZER)
        media = batch.media
        assert media is not None
        for row, task in enumerate(names[number] for number in media.task):
            counts[task] += 1
            drawn, spoken = media.is_drawn[row].any(), media.is_spoken[row].any()
            assert (drawn, spoken) == (task == "draw", task == "speak")
            assert media.is_image[row].any() == (task in ("draw", "caption"))
            assert (media.mel_lengths[row] > 0).any() == (task in ("speak", "transcribe"))
            words = text(batch, row)
            match task:
                case "draw":
                    assert words.endswith("<|IMAGE|><|/IMAGE|>") and words[0] != "<"
                case "caption":
                    assert words.removeprefix("<|IMAGE|><|/IMAGE|>") in (WORDS)
                case "speak":
                    assert words.startswith("a ") and words.endswith("<|AUDIO|><|/AUDIO|>")
                case "transcribe":
                    assert words.startswith("<|AUDIO|><|/AUDIO|>a ")
                case "text":
                    assert words in documents
    # 96 rows: 32 and 16 expected.
    assert 20 < counts["draw"] < 46
    assert all(5 < counts[name] < 30 for name in names if name != "draw")


def test_a_resumed_stream_and_one_of_a_worker_or_more_processes_are_the_same(
    batches: list[Batch],
) -> None:
    assert_same(take(config(), 1, start=3)[0], batches[3])
    ahead = config(num_workers=1, prefetch_batches=1)
    assert_same(take(ahead, 1, start=3)[0], batches[3])
    halves = [
        take(config(), 1, start=3, process_index=index, process_count=2)[0] for index in (0, 1)
    ]
    for whole, first, second in zip(leaves(batches[3]), *map(leaves, halves), strict=True):
        np.testing.assert_array_equal(whole, np.concatenate([first, second]))
    other = take(config(seed=1), 1, start=3)[0]
    assert not np.array_equal(other.tokens, batches[3].tokens)


def test_without_shuffling_records_come_in_their_order() -> None:
    settings = with_media(config(shuffle=False), tasks=("speak=1",))
    settings = with_media(settings, audio=AudioDataConfig(source="tones", num_tones=5))
    first, second = take(settings, 2)
    # Four records are left to train on.
    np.testing.assert_array_equal(first.tokens[:4], first.tokens[4:])
    np.testing.assert_array_equal(first.media.mels, second.media.mels)


def test_validation_is_one_pass_over_what_training_never_sees() -> None:
    base = config(validation_fraction=0.02)
    settings = with_media(base, tasks=("draw=1", "caption=3"), audio=AudioDataConfig())
    held_out = validation_batches(settings, TOKENIZER, media=FORMATS)
    assert len(held_out) == 9  # 36 digits twice, in batches of 8.
    tasks = np.concatenate([batch.media.task for batch in held_out])
    np.testing.assert_array_equal(tasks, [0, 1] * 36)
    images = np.concatenate([batch.media.images[:, 0] for batch in held_out])
    np.testing.assert_array_equal(images[::2], images[1::2])
    seen = {image.tobytes() for image in images}
    assert len(seen) == 36
    for batch in take(settings, 30):
        assert not seen & {image.tobytes() for image in batch.media.images[:, 0]}
    assert_same(
        validation_batches(settings, TOKENIZER, num_batches=1, media=FORMATS)[0], held_out[0]
    )


def test_tasks_take_turns_until_one_has_no_more_records() -> None:
    assert validation_rows([1, 3]) == [(0, 0), (1, 0), (1, 1), (1, 2)]


def test_augmentation_changes_inputs_alone_and_validation_not_at_all(
    batches: list[Batch],
) -> None:
    settings = with_media(
        config(),
        images=ImageDataConfig(augmentation=ImageAugmentationConfig(max_brightness=0.5)),
        audio=AudioDataConfig(
            source="tones", num_tones=40, augmentation=AudioAugmentationConfig(max_speed=0.3)
        ),
    )
    names = task_names(settings)
    lengths_changed = 0
    changed = take(settings, 3)
    for before, after in zip(batches[:3], changed, strict=True):
        assert all(np.array_equal(*pair) for pair in zip(before[:-1], after[:-1], strict=True))
        for row, task in enumerate(names[number] for number in before.media.task):
            same_image = np.array_equal(before.media.images[row], after.media.images[row])
            same_mel = np.array_equal(before.media.mels[row], after.media.mels[row])
            assert same_image == (task != "caption")
            assert same_mel == (task != "transcribe")
            lengths_changed += (before.media.mel_lengths[row] != after.media.mel_lengths[row]).sum()
    assert lengths_changed > 1
    assert_same(changed[1], take(settings, 1, start=1)[0])
    plain, augmented = (
        validation_batches(each, TOKENIZER, num_batches=2, media=FORMATS)
        for each in (config(), settings)
    )
    assert_same(plain[1], augmented[1])


def test_targets_are_augmented_where_that_is_asked_for() -> None:
    options = ImageAugmentationConfig(max_brightness=0.5, targets=True)
    base = with_media(config(), tasks=("draw=1",), audio=AudioDataConfig())
    settings = with_media(base, images=ImageDataConfig(augmentation=options))
    plain, changed = take(base, 1)[0], take(settings, 1)[0]
    np.testing.assert_array_equal(plain.tokens, changed.tokens)
    assert all(
        not np.array_equal(*pair)
        for pair in zip(plain.media.images, changed.media.images, strict=True)
    )


@pytest.fixture
def folder(tmp_path: pathlib.Path) -> pathlib.Path:
    """Nine images, of which two are too large, and a caption that is too long."""
    lines = []
    for number in range(9):
        size = (9, 8) if number < 2 else (8, 8)
        Image.new("L", size, 20 * number).save(tmp_path / f"{number}.png")
        caption = "x" * 60 if number == 2 else f"grey {number}"
        lines.append(json.dumps({"image": f"{number}.png", "caption": caption}))
    (tmp_path / "captions.jsonl").write_text("\n".join(lines))
    return tmp_path


def folder_config(folder: pathlib.Path, **changes: Any) -> DataConfig:
    images = ImageDataConfig(source="image_folder", folder=str(folder))
    base = with_media(config(**changes), tasks=("caption=1",), audio=AudioDataConfig())
    return with_media(base, images=images)


def test_bad_records_are_errors_or_counted(folder: pathlib.Path) -> None:
    with pytest.raises(BadRecordError, match=r"\.png .*data\.on_bad_record='skip'"):
        take(folder_config(folder), 5)
    settings = folder_config(folder, on_bad_record="skip", validation_fraction=0.8)
    with build_pipeline(settings, TOKENIZER, split="train", media=FORMATS) as batches:
        rows = [next(batches) for _ in range(6)]
    assert all((batch.segment_ids[:, 0] == 1).all() for batch in rows)
    good = {f"<|IMAGE|><|/IMAGE|>grey {n}" for n in range(3, 9)}
    assert {text(batch, row) for batch in rows for row in range(8)} <= good
    with build_pipeline(settings, TOKENIZER, split="validation", media=FORMATS) as batches:
        (held_out,) = list(batches)
        skipped = batches.bad_records.count
    # 7 of 9 records, and a row of padding for each that is bad.
    assert skipped > 0 and (held_out.segment_ids[:, 0] == 1).sum() == 7 - skipped
    assert not held_out.media.images[held_out.segment_ids[:, 0] == 0].any()


def test_a_folder_of_bad_records_alone_ends_the_run(folder: pathlib.Path) -> None:
    (folder / "captions.jsonl").write_text(
        "\n".join(json.dumps({"image": f"{n}.png", "caption": "wide"}) for n in (0, 1))
    )
    settings = folder_config(folder, on_bad_record="skip")
    with pytest.raises(UserError, match=f"{8 * MAX_ATTEMPTS} records of it are bad, the first: "):
        take(settings, 1)


def test_media_need_formats_and_a_tokenizer_with_markers() -> None:
    with pytest.raises(ValueError, match="needs `media` formats and a MediaTokenizer"):
        build_pipeline(config(), TOKENIZER, split="train")
    with pytest.raises(ValueError, match="needs `media` formats and a MediaTokenizer"):
        build_pipeline(config(), BytesTokenizer(), split="train", media=FORMATS)
