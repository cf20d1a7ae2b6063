"""Rows with media by random access: row n is a function of the configuration and n.

A task says how a record becomes a sample; rows without media hold plain text.
"""

import dataclasses
import itertools
import sys
import typing
from collections import OrderedDict
from collections.abc import Callable

import grain
import numpy as np

from megatransformer_jax.config.data import DataConfig
from megatransformer_jax.config.media_data import AUDIO_TASKS, IMAGE_TASKS
from megatransformer_jax.data.augmentation.media import augment_image, augment_mel, augment_waveform
from megatransformer_jax.data.augmentation.text import FailedAugmentation
from megatransformer_jax.data.documents import in_order
from megatransformer_jax.data.media.encoding import (
    EncodedSample,
    RowShape,
    SampleError,
    check_fits,
    check_waveform,
    encode_sample,
)
from megatransformer_jax.data.media.records import (
    AudioPart,
    AudioRecord,
    ImagePart,
    ImageRecord,
    MediaFormats,
    Sample,
)
from megatransformer_jax.data.media.row_texts import RowTexts
from megatransformer_jax.data.media_tokenizer import MediaTokenizer
from megatransformer_jax.data.mel import normalized_mel
from megatransformer_jax.data.sources.record import BadRecord, Records
from megatransformer_jax.data.tokenizer import Tokenizer
from megatransformer_jax.streams import Purpose, generator_of

# ------------------------------------------------------------------------------
# Rows.

# Spectrograms kept per process: 256 MiB of 128 frames and 80 bins.
MAX_CACHED_MELS = 6500
# A row whose record is bad tries others this often, then stays empty.
MAX_ATTEMPTS = 10


class Row(typing.NamedTuple):
    """One row: None is padding, as a validation row is whose record is bad.

    Attributes:
      task: number of its task.
      content: what it holds.
      bad_records: that were met on the way to it, or a text that could not be augmented.
    """

    task: int
    content: EncodedSample | None
    bad_records: tuple[BadRecord | FailedAugmentation, ...] = ()


class RowMaker:
    """From a task and the number of a record to the row's content.

    Attributes:
      sources: 'images', 'audio' and 'text', those that the tasks need.
    """

    def __init__(
        self,
        config: DataConfig,
        tokenizer: MediaTokenizer,
        formats: MediaFormats,
        sources: dict[str, Records[typing.Any]],
        *,
        augments: bool,
    ):
        self.sources = sources
        self._seed = config.seed
        self._tokenizer = tokenizer
        self._formats = formats
        self._images = config.media.images.augmentation
        self._audio = config.media.audio.augmentation
        self._changed_tasks = _changed_tasks(config) if augments else ()
        self._texts = RowTexts(config, tokenizer.pad_id) if augments else None
        self.shape = RowShape(
            config.sequence_length, config.media.images_per_row, config.media.audio_per_row
        )
        self._mels: OrderedDict[int, tuple[AudioRecord, np.ndarray]] = OrderedDict()

    def make(
        self, task: str, index: int, number: int, rng: np.random.Generator
    ) -> EncodedSample | BadRecord | FailedAugmentation:
        """The row.

        Args:
          task: its task.
          index: of the record in the task's source.
          number: of the row, which decides how the record is changed.
          rng: draws the text.
        """
        try:
            kind = source_of(task)
            if kind == "text":
                content = self._text_row(index, number)
            else:
                make = self._image_sample if kind == "images" else self._audio_sample
                sample: Sample | BadRecord | FailedAugmentation = make(task, index, number, rng)
                if self._texts is not None and isinstance(sample, Sample):
                    sample = self._texts.change_sample(sample, number)
                if not isinstance(sample, Sample):
                    return sample
                content = encode_sample(sample, self._tokenizer, self._formats)
                check_fits(content, sample.name, self.shape)
            if self._texts is None or isinstance(content, FailedAugmentation):
                return content
            return self._texts.hide(content, number)
        except SampleError as error:
            where, _, problem = str(error).partition(": ")
            return BadRecord(where, problem)

    def _text_row(self, index: int, number: int) -> EncodedSample | FailedAugmentation:
        pieces = typing.cast(TextPieces, self.sources["text"])
        if self._texts is None or not self._texts.changes_words:
            return pieces[index]
        change = self._texts.change
        return pieces.changed(index, lambda text: change(text, number))

    def _image_sample(
        self, task: str, index: int, number: int, rng: np.random.Generator
    ) -> Sample | BadRecord:
        record: ImageRecord | BadRecord = self.sources["images"][index]
        if isinstance(record, BadRecord):
            return record
        pixels = record.pixels
        if task in self._changed_tasks:
            draws = generator_of(self._seed, number, Purpose.IMAGE_AUGMENTATION)
            pixels = augment_image(pixels, self._images, draws)
        return image_sample(task, record, pixels, rng)

    def _audio_sample(
        self, task: str, index: int, number: int, rng: np.random.Generator
    ) -> Sample | BadRecord:
        del rng  # A clip has one transcript.
        changes = task in self._changed_tasks
        if not (changes and self._audio.changes_waveforms):
            found = self._record_and_mel(index)
            if isinstance(found, BadRecord):
                return found
            record, mel = found
            if changes:
                mel = augment_mel(mel, self._audio, self._draws(number))
            return audio_sample(task, record, mel)
        record = self.sources["audio"][index]
        if isinstance(record, BadRecord):
            return record
        check_waveform(record.waveform, record.where)
        draws = self._draws(number)
        audio = self._formats.audio
        max_samples = audio.max_frames * audio.mel.hop_samples
        waveform = augment_waveform(
            record.waveform, record.sample_rate_hz, max_samples, self._audio, draws
        )
        mel = augment_mel(normalized_mel(waveform, audio.mel), self._audio, draws)
        return audio_sample(task, record, mel)

    def _draws(self, number: int) -> np.random.Generator:
        return generator_of(self._seed, number, Purpose.AUDIO_AUGMENTATION)

    def _record_and_mel(self, index: int) -> tuple[AudioRecord, np.ndarray] | BadRecord:
        """Kept once made, as reading and transforming a clip takes milliseconds."""
        if index in self._mels:
            self._mels.move_to_end(index)
            return self._mels[index]
        record = self.sources["audio"][index]
        if isinstance(record, BadRecord):
            return record
        check_waveform(record.waveform, record.where)
        mel = normalized_mel(record.waveform, self._formats.audio.mel)
        self._mels[index] = dataclasses.replace(record, waveform=np.zeros(0, np.float32)), mel
        if len(self._mels) > MAX_CACHED_MELS:
            self._mels.popitem(last=False)
        return self._mels[index]


def _changed_tasks(config: DataConfig) -> tuple[str, ...]:
    """Tasks whose media are augmented."""
    images, audio = config.media.images.augmentation, config.media.audio.augmentation
    tasks: tuple[str, ...] = ("transcribe",) if audio.changes_clips else ()
    if images.changes_images:
        tasks += ("caption", "draw") if images.targets else ("caption",)
    return tasks


class TrainingRows:
    """Endless rows: tasks by weight in each batch, and the record of the row's number in the order.

    With data.shuffle the order of records is new in each epoch of a source.
    """

    def __init__(self, maker: RowMaker, config: DataConfig):
        self._maker = maker
        self._seed = config.seed
        self._batch_size = config.batch_size
        self._names = task_names(config)
        self._weights = np.array(list(config.media.task_weights.values()))
        self._batch = -1, np.zeros(0, int)  # Number and tasks of the batch that was read last.
        self._orders = {
            name: in_order(
                grain.MapDataset.range(len(source)),
                seed=config.seed,
                shuffle=config.shuffle,
                repeat=True,
            )
            for name, source in maker.sources.items()
        }

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, number: int) -> Row:
        rng = generator_of(self._seed, number, Purpose.MEDIA_ROW)
        task = self._task(number)
        name = self._names[task]
        order = self._orders[source_of(name)]
        index = int(order[number])
        bad: list[BadRecord] = []
        for _ in range(MAX_ATTEMPTS):
            content = self._maker.make(name, index, number, rng)
            if isinstance(content, FailedAugmentation):
                return Row(task, None, (content,))
            if not isinstance(content, BadRecord):
                return Row(task, content, tuple(bad))
            bad.append(content)
            index = int(rng.integers(len(self._maker.sources[source_of(name)])))
        return Row(task, None, tuple(bad))

    def _task(self, number: int) -> int:
        batch, row = divmod(number, self._batch_size)
        if self._batch[0] != batch:
            rng = generator_of(self._seed, batch, Purpose.MEDIA_TASKS)
            self._batch = batch, batch_tasks(self._weights, self._batch_size, rng)
        return int(self._batch[1][row])


class ValidationRows:
    """The held-out records of every task once, tasks taking turns."""

    def __init__(self, maker: RowMaker, config: DataConfig):
        self._maker = maker
        self._seed = config.seed
        self._names = task_names(config)
        self._rows = validation_rows([len(maker.sources[source_of(name)]) for name in self._names])

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, number: int) -> Row:
        task, index = self._rows[number]
        rng = generator_of(self._seed, number, Purpose.MEDIA_ROW)
        content = self._maker.make(self._names[task], index, number, rng)
        if isinstance(content, BadRecord | FailedAugmentation):
            return Row(task, None, (content,))
        return Row(task, content)


# ------------------------------------------------------------------------------
# Tasks: how a record becomes a sample, and which task each row has.


def task_names(config: DataConfig) -> tuple[str, ...]:
    """Names of the tasks that rows may have, in the order of their numbers in `MediaBatch.task`."""
    return tuple(config.media.task_weights)


def source_of(task: str) -> str:
    """'images', 'audio' or 'text': where a task's records come from."""
    if task in IMAGE_TASKS:
        return "images"
    return "audio" if task in AUDIO_TASKS else "text"


def image_sample(
    task: str, record: ImageRecord, pixels: np.ndarray, rng: np.random.Generator
) -> Sample:
    """draw: a prompt, then the image as a target. caption: the image, then a caption.

    Args:
      task: 'draw' or 'caption'.
      record: the texts are drawn from its.
      pixels: the record's, or changed.
      rng: makes one draw.
    """
    texts = record.prompts if task == "draw" else record.captions
    text = texts[int(rng.integers(len(texts)))]
    image = ImagePart(pixels, is_target=task == "draw")
    return Sample((text, image) if task == "draw" else (image, text), record.where)


def audio_sample(task: str, record: AudioRecord, mel: np.ndarray) -> Sample:
    """speak: the transcript, then the clip as a target. transcribe: the clip, then its transcript.

    Args:
      task: 'speak' or 'transcribe'.
      record: the transcript is its.
      mel: its spectrogram, normalised, or one of a changed clip.
    """
    clip = AudioPart(record.waveform, record.sample_rate_hz, record.is_voice, task == "speak", mel)
    parts = (record.transcript, clip) if task == "speak" else (clip, record.transcript)
    return Sample(parts, record.where)


def batch_tasks(weights: np.ndarray, batch_size: int, rng: np.random.Generator) -> np.ndarray:
    """Numbers of the tasks of a batch's rows, int [batch_size].

    Systematic sampling: each task has its share of the rows in proportion to `weights`, rounded up
    or down so that the mean over batches is the share. No task is starved by bad luck.
    """
    bounds = np.cumsum(weights) / np.sum(weights)
    places = (np.arange(batch_size) + rng.random()) / batch_size
    tasks = np.minimum(np.searchsorted(bounds, places, side="right"), len(weights) - 1)
    return rng.permutation(tasks)


def validation_rows(sizes: list[int]) -> list[tuple[int, int]]:
    """Task number and record of each row of one pass over `sizes[task]` records of each task.

    Tasks take turns, so that the first rows are balanced, until one has no more records.
    """
    turns = itertools.zip_longest(*([(task, n) for n in range(s)] for task, s in enumerate(sizes)))
    return [row for turn in turns for row in turn if row is not None]


# ------------------------------------------------------------------------------
# Plain text for rows that have no media.


class TextPieces:
    """Documents cut into pieces that fill a row each; the last one of a document may be shorter.

    Every piece starts with the start token. A document's last one has the end token as its last
    target, the others the token that comes next.
    """

    def __init__(
        self, documents: Records[str | BadRecord], tokenizer: Tokenizer, sequence_length: int
    ):
        self._tokenizer = tokenizer
        self._size = sequence_length - 1  # The start token takes one place.
        self._texts = documents
        self._documents = []
        self._pieces = []
        for number in range(len(documents)):
            text = documents[number]
            assert isinstance(text, str), "our own text has no bad records"
            ids = self._encode(text)
            self._documents.append(ids)
            starts = range(0, max(len(ids) - 1, 1), max(self._size, 1))
            self._pieces += [(number, start) for start in starts]

    def __len__(self) -> int:
        return len(self._pieces)

    def __getitem__(self, index: int) -> EncodedSample:
        document, start = self._pieces[index]
        return self._piece(self._documents[document], start)

    def changed(
        self, index: int, change: Callable[[str], str | FailedAugmentation]
    ) -> EncodedSample | FailedAugmentation:
        """The piece at the same place of the changed document, or its last if it is shorter."""
        document, start = self._pieces[index]
        text = change(typing.cast(str, self._texts[document]))
        if isinstance(text, FailedAugmentation):
            return text
        ids = self._encode(text)
        size = max(self._size, 1)
        return self._piece(ids, min(start, max(len(ids) - 2, 0) // size * size))

    def _encode(self, text: str) -> np.ndarray:
        return np.array([*self._tokenizer.encode(text), self._tokenizer.eos_id], np.int32)

    def _piece(self, ids: np.ndarray, start: int) -> EncodedSample:
        targets = ids[start : start + self._size + 1]
        tokens = np.concatenate(([self._tokenizer.bos_id], targets[:-1])).astype(np.int32)
        return EncodedSample(
            tokens=tokens,
            targets=targets,
            loss_mask=np.ones(len(tokens), np.float32),
            follows=np.zeros(len(tokens), np.int32),
        )
