"""Rows with several media: each holds as many as it has slots, and its answer needs all of them."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from smallest_media_model import TOKENIZER, make_model

from megatransformer_jax.config.data import DataConfig, TokenizerConfig
from megatransformer_jax.config.media_data import (
    ImageAugmentationConfig,
    ImageDataConfig,
    MediaDataConfig,
)
from megatransformer_jax.config.option import ConfigError
from megatransformer_jax.data.media.encoding import RowShape, check_media, make_batch
from megatransformer_jax.data.media.records import AudioRecord, ImageRecord, MediaFormats
from megatransformer_jax.data.media.rows import RowMaker, TrainingRows, ValidationRows, task_names
from megatransformer_jax.data.pipeline import build_pipeline
from megatransformer_jax.data.sources.record import BadRecord
from megatransformer_jax.evaluation.media.validation import is_answer
from megatransformer_jax.losses.tokens import token_cross_entropy
from megatransformer_jax.types import Batch, MediaBatch

MODEL, PARAMS = make_model()
FORMATS = MediaFormats.of_model(MODEL.config)
HOP = FORMATS.audio.mel.hop_samples
# Texts of the images and clips. The pixels of an image are its number, a clip is as long as it.
TEXTS = ("nil", "one", "two", "one", "two", "nil", "one")


class Images:
    def __len__(self) -> int:
        return len(TEXTS)

    def __getitem__(self, index: int) -> ImageRecord | BadRecord:
        pixels = np.full((8, 8, 1), index / 10, np.float32)
        return ImageRecord(pixels, (TEXTS[index],), (TEXTS[index],), f"image {index}")


class Clips:
    def __init__(self, texts: tuple[str, ...] = TEXTS):
        self._texts = texts

    def __len__(self) -> int:
        return len(self._texts)

    def __getitem__(self, index: int) -> AudioRecord | BadRecord:
        samples = np.sin(np.arange(HOP * (index + 1), dtype=np.float32))
        return AudioRecord(samples, 8000, self._texts[index], True, f"clip {index}")


def config(*tasks: str, images: int = 3, audio: int = 1, **changes: Any) -> DataConfig:
    media = MediaDataConfig(tasks=tasks, images_per_row=images, audio_per_row=audio)
    return DataConfig(
        **{
            "source": "media",
            "tokenizer": TokenizerConfig(kind="bytes"),
            "batch_size": 4,
            "sequence_length": 40,
            "prefetch_batches": 0,
            "media": media,
        }
        | changes
    )


def rows(settings: DataConfig, count: int | None, clips: Any = None) -> list[Any]:
    """Contents of the first training rows, or of all validation rows, of the sources above."""
    sources = {"images": Images(), "audio": clips or Clips()}
    maker = RowMaker(settings, TOKENIZER, FORMATS, sources, augments=False)
    found = ValidationRows(maker, settings) if count is None else TrainingRows(maker, settings)
    numbers = range(len(found) if count is None else count)
    return [found[number] for number in numbers]


def text(row: Any) -> str:
    return TOKENIZER.decode_with_media(row.content.tokens)


def numbers_of(row: Any) -> list[int]:
    return [round(float(pixels[0, 0, 0]) * 10) for pixels in row.content.images]


def test_which_asks_for_one_of_as_many_images_as_a_row_has_slots() -> None:
    places = []
    for row in rows(config("which=1"), 300):
        words = text(row)
        asked = words.partition("Which is ")[2].partition("?")[0]
        numbered = "".join(f"{n}<|IMAGE|><|/IMAGE|>" for n in (1, 2, 3))
        assert words.startswith(f"{numbered}Which is {asked}?")
        place = int(words[-1])
        fits = [TEXTS[number] == asked for number in numbers_of(row)]
        assert len(fits) == 3 and fits.index(True) == place - 1 and sum(fits) == 1
        assert not any(row.content.is_drawn)
        # Of the text the number counts, and the end; besides the tokens around images.
        targets = row.content.targets[row.content.loss_mask > 0].tolist()
        assert TOKENIZER.decode(targets[-2:-1]) == words[-1] and len(targets) == 2 + 2 * 3 - 3
        places.append(place)
    counts = np.bincount(places)[1:]
    assert len(counts) == 3 and counts.min() > 75  # 100 each; neither place nor text says which.


def test_validation_asks_for_every_record_once_and_a_row_is_always_the_same() -> None:
    once, again = (rows(config("which=1"), None) for _ in range(2))
    assert [text(row) for row in once] == [text(row) for row in again]
    asked = [numbers_of(row)[int(text(row)[-1]) - 1] for row in once]
    assert asked == list(range(len(TEXTS)))


def test_fewshot_has_a_caption_behind_each_image_and_asks_for_another_one_at_the_end() -> None:
    for index, row in enumerate(rows(config("fewshot=1", images=4), None)):
        numbers = numbers_of(row)
        assert len(numbers) == 4 and numbers[-1] == index and index not in numbers[:-1]
        assert text(row) == "".join(f"<|IMAGE|><|/IMAGE|>{TEXTS[n]}" for n in numbers)
        # The captions count, all of them, and the end.
        assert row.content.loss_mask.sum() == len(row.content.tokens) - 4


def test_which_clip_and_read_aloud_have_clips_that_fit() -> None:
    for row in rows(config("which_clip=1", images=1, audio=2), 20):
        asked = text(row).partition("Which is ")[2].partition("?")[0]
        clips = [TEXTS[len(mel) - 1] for mel in row.content.mels]
        assert len(clips) == 2 and clips.index(asked) == int(text(row)[-1]) - 1
        assert text(row).count("<|VOICE|><|/VOICE|>") == 2
    said = set()
    for row in rows(config("read_aloud=1", images=1), 40):
        assert text(row) == "<|IMAGE|><|/IMAGE|><|VOICE|><|/VOICE|>"
        (image,), (mel,) = numbers_of(row), row.content.mels
        assert TEXTS[image] == TEXTS[len(mel) - 1]
        said.add((image, len(mel) - 1))
        assert row.content.is_spoken == (True,) and row.content.is_drawn == (False,)
    assert len(said) > 10  # Any clip with the words.


def test_a_row_without_a_fitting_record_is_a_bad_record_that_says_so() -> None:
    clips = Clips(("nil", "nil"))
    (row,) = rows(config("which_clip=1", images=1, audio=2), 1, clips)
    assert row.content is None
    assert "has no other than 'nil', among 1000 that were drawn of data.media.audio" in str(
        row.bad_records[0]
    )
    settings = config("read_aloud=1", images=1)
    bad = [bad for row in rows(settings, 9, clips) for bad in row.bad_records]
    assert bad and "no clip has one of its captions, ('one',), as transcript" in " ".join(
        map(str, bad)
    )


def test_fewshot_needs_another_image_in_its_split() -> None:
    with pytest.raises(ConfigError, match=r"'fewshot' shows other images .* has only one; give"):
        RowMaker(config("fewshot=1"), TOKENIZER, FORMATS, {"images": [None]}, augments=False)


def test_embedded_digits_fill_the_slots_and_inputs_alone_are_augmented() -> None:
    plain = config("which=2", "caption=1", "fewshot=1")
    options = ImageDataConfig(augmentation=ImageAugmentationConfig(max_brightness=0.5))
    changed = dataclasses.replace(plain, media=dataclasses.replace(plain.media, images=options))
    found = []
    for settings in (plain, changed):
        with build_pipeline(settings, TOKENIZER, split="train", media=FORMATS) as batches:
            found.append(next(batches))
    before, after = found
    for batch in found:
        check_media(batch, TOKENIZER)
    slots = {"which": 3, "caption": 1, "fewshot": 3}
    tasks = [task_names(plain)[number] for number in before.media.task]
    assert sorted(tasks) == ["caption", "fewshot", "which", "which"]
    assert before.media.is_image.sum(axis=1).tolist() == [slots[task] for task in tasks]
    np.testing.assert_array_equal(before.tokens, after.tokens)
    differs = np.any(before.media.images != after.media.images, axis=(2, 3, 4))
    np.testing.assert_array_equal(differs, before.media.is_image)


@jax.jit
def answer_slopes(params: Any, batch: Batch) -> MediaBatch:
    """Of the loss of the text behind the last medium, in every pixel and bin."""
    counts = is_answer(batch.media.follows, batch.loss_mask) * batch.loss_mask

    def loss(images: jax.Array, mels: jax.Array) -> jax.Array:
        output: Any = MODEL.apply(
            {"params": params},
            batch.tokens,
            segment_ids=batch.segment_ids,
            media=batch.media._replace(images=images, mels=mels),
            num_steps=2,
            backprop_depth=1,
            rngs={"state": jax.random.key(0)},
        )
        return jnp.sum(token_cross_entropy(output.logits, batch.targets) * counts)

    images, mels = jax.grad(loss, (0, 1))(batch.media.images, batch.media.mels)
    return batch.media._replace(images=images, mels=mels)


@pytest.mark.parametrize("task", ["which", "fewshot", "which_clip", "read_aloud"])
def test_the_loss_of_an_answer_depends_on_every_medium_of_the_row(task: str) -> None:
    images, clips = {"which_clip": (0, 2), "read_aloud": (1, 1)}.get(task, (3, 0))
    settings = config(f"{task}=1", images=max(images, 1), audio=max(clips, 1))
    contents = [row.content for row in rows(settings, 4)]
    made = make_batch(contents, [0] * 4, RowShape(40, 3, 2), FORMATS, TOKENIZER.pad_id)
    batch = jax.tree.map(jnp.asarray, made)
    slopes = answer_slopes(PARAMS, batch)
    for slope, slots, used in ((slopes.images, 3, images), (slopes.mels, 2, clips)):
        depends = np.abs(np.asarray(slope)).max(axis=tuple(range(2, slope.ndim))) > 1e-6
        np.testing.assert_array_equal(depends, np.tile(np.arange(slots) < used, (4, 1)))
