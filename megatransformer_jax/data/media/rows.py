"""Rows with media by random access: row n is a function of the configuration and n.

A task says how a record becomes a sample; rows without media hold plain text.
"""

import dataclasses
import functools
import itertools
import sys
import typing
from collections import OrderedDict
from collections.abc import Callable, Sequence

import grain
import numpy as np

from megatransformer_jax.config.data import DataConfig
from megatransformer_jax.config.media_tasks import ROW_TASKS
from megatransformer_jax.config.option import ConfigError
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
    Given,
    ImagePart,
    ImageRecord,
    MediaFormats,
    Part,
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
# Records that are drawn in search of one that fits.
MAX_DRAWS = 1000
# Behind media of which one fits a text.
WHICH_QUESTION = "Which is {}?"


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


class _Unusable(Exception):
    """Ends the making of a row whose record is bad."""

    def __init__(self, record: BadRecord):
        super().__init__(str(record))
        self.record = record


class RowMaker:
    """From a task and the number of a record to the row's content.

    Attributes:
      sources: 'images', 'audio', 'documents' and 'text', those that the tasks need.
      shape: of a row.

    Raises:
      ConfigError: if a row of several images has only one to choose from.
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
        if "fewshot" in config.media.task_weights and len(sources["images"]) < 2:
            raise ConfigError(
                "data.media.tasks",
                "'fewshot' shows other images of the same split, and this split, training or "
                "validation, has only one; give more images, change data.validation_fraction, or "
                "leave the task out.",
            )
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
        self._records: dict[tuple[str, int], typing.Any] = {}  # What the row has read so far.

    def make(
        self, task: str, index: int, number: int, rng: np.random.Generator
    ) -> EncodedSample | BadRecord | FailedAugmentation:
        """The row.

        Args:
          task: its task.
          index: of the record in the task's source.
          number: of the row, which decides how media are changed.
          rng: draws texts, places and the other records of a row that has several.
        """
        self._records.clear()
        try:
            if source_of(task) == "text":
                content = self._text_row(index, number)
            else:
                sample = self._sample(task, index, number, rng)
                if self._texts is not None:
                    changed = self._texts.change_sample(sample, number)
                    if isinstance(changed, FailedAugmentation):
                        return changed
                    sample = changed
                content = encode_sample(sample, self._tokenizer, self._formats)
                check_fits(content, sample.name, self.shape)
            if self._texts is None or isinstance(content, FailedAugmentation):
                return content
            return self._texts.hide(content, number)
        except _Unusable as found:
            return found.record
        except SampleError as error:
            where, _, problem = str(error).partition(": ")
            return BadRecord(where, problem)

    def _text_row(self, index: int, number: int) -> EncodedSample | FailedAugmentation:
        pieces = typing.cast(TextPieces, self.sources["text"])
        if self._texts is None or not self._texts.changes_words:
            return pieces[index]
        change = self._texts.change
        return pieces.changed(index, lambda text: change(text, number))

    def _sample(self, task: str, index: int, number: int, rng: np.random.Generator) -> Sample:
        image = functools.partial(
            self._image, task, self._draws(number, Purpose.IMAGE_AUGMENTATION)
        )
        clip = functools.partial(self._clip, task, self._draws(number, Purpose.AUDIO_AUGMENTATION))
        match task:
            case "draw" | "caption":
                return image_sample(task, image(index), rng)
            case "speak" | "transcribe":
                return audio_sample(task, *clip(index))
            case "fewshot":
                return fewshot_sample([image(n) for n in self._shots(index, rng)], rng)
            case "which":
                return self._which("images", index, image, self.shape.images, rng)
            case "which_clip":
                return self._which("audio", index, clip, self.shape.audio, rng)
            case "read_aloud":
                seen = image(index)
                return read_aloud_sample(seen, *clip(self._said(seen, rng)))
            case "documents":
                return typing.cast(Sample, self._record("documents", index))
        raise ValueError(f"no row is made for the task {task!r}")

    def _draws(self, number: int, purpose: Purpose) -> np.random.Generator:
        return generator_of(self._seed, number, purpose)

    def _record(self, source: str, index: int) -> typing.Any:
        if (source, index) not in self._records:
            self._records[source, index] = self.sources[source][index]
        record = self._records[source, index]
        if isinstance(record, BadRecord):
            raise _Unusable(record)
        return record

    def _image(self, task: str, draws: np.random.Generator, index: int) -> ImageRecord:
        """The record, its pixels changed where the task's are."""
        record: ImageRecord = self._record("images", index)
        if task not in self._changed_tasks:
            return record
        pixels = augment_image(record.pixels, self._images, draws)
        return dataclasses.replace(record, pixels=pixels)

    def _clip(
        self, task: str, draws: np.random.Generator, index: int
    ) -> tuple[AudioRecord, np.ndarray]:
        """The record and its normalised spectrogram, changed where the task's are."""
        changes = task in self._changed_tasks
        if not (changes and self._audio.changes_waveforms):
            record, mel = self._record_and_mel(index)
            return record, augment_mel(mel, self._audio, draws) if changes else mel
        record = self._record("audio", index)
        check_waveform(record.waveform, record.where)
        audio = self._formats.audio
        max_samples = audio.max_frames * audio.mel.hop_samples
        waveform = augment_waveform(
            record.waveform, record.sample_rate_hz, max_samples, self._audio, draws
        )
        return record, augment_mel(normalized_mel(waveform, audio.mel), self._audio, draws)

    def _record_and_mel(self, index: int) -> tuple[AudioRecord, np.ndarray]:
        """Kept once made, as reading and transforming a clip takes milliseconds."""
        if index in self._mels:
            self._mels.move_to_end(index)
            return self._mels[index]
        record: AudioRecord = self._record("audio", index)
        check_waveform(record.waveform, record.where)
        mel = normalized_mel(record.waveform, self._formats.audio.mel)
        self._mels[index] = dataclasses.replace(record, waveform=np.zeros(0, np.float32)), mel
        if len(self._mels) > MAX_CACHED_MELS:
            self._mels.popitem(last=False)
        return self._mels[index]

    # Rows with several records.

    def _shots(self, index: int, rng: np.random.Generator) -> list[int]:
        """Other images in front of the one to caption, which is none of them."""
        others = rng.integers(len(self.sources["images"]) - 1, size=self.shape.images - 1)
        return [*(int(other + (other >= index)) for other in others), index]

    def _which(
        self,
        source: str,
        index: int,
        read: Callable[[int], typing.Any],
        count: int,
        rng: np.random.Generator,
    ) -> Sample:
        """One record at a place that is drawn, among others that its text does not fit."""
        asked = self._record(source, index)
        texts = _texts(asked)
        text = _drawn(texts, rng)
        place = int(rng.integers(count))

        def is_other(record: ImageRecord | AudioRecord) -> bool:
            return not set(_texts(record)) & set(texts)

        numbers = [
            index
            if slot == place
            else self._find(source, is_other, f"{asked.where}: has no other than {text!r}", rng)
            for slot in range(count)
        ]
        return which_sample(text, place, [read(number) for number in numbers], asked.where)

    def _said(self, image: ImageRecord, rng: np.random.Generator) -> int:
        """The number of a clip that says a caption of the image."""

        def says_it(clip: AudioRecord) -> bool:
            return clip.transcript in image.captions

        problem = f"{image.where}: no clip has one of its captions, {image.captions}, as transcript"
        return self._find("audio", says_it, problem, rng)

    def _find(
        self,
        source: str,
        is_wanted: Callable[[typing.Any], bool],
        problem: str,
        rng: np.random.Generator,
    ) -> int:
        """The number of a record that is wanted, all of which are equally likely.

        Raises:
          SampleError: if none is found.
        """
        count = len(self.sources[source])
        for _ in range(MAX_DRAWS):
            number = int(rng.integers(count))
            if is_wanted(self._record(source, number)):
                return number
        raise SampleError(
            f"{problem}, among {MAX_DRAWS} that were drawn of data.media.{source}. Leave out the "
            "task, or give data of which more fit."
        )


def _texts(record: ImageRecord | AudioRecord) -> tuple[str, ...]:
    return record.captions if isinstance(record, ImageRecord) else (record.transcript,)


def _changed_tasks(config: DataConfig) -> tuple[str, ...]:
    """Tasks whose media are augmented: those that the model reads, and on request drawings."""
    images, audio = config.media.images.augmentation, config.media.audio.augmentation
    tasks: tuple[str, ...] = ("transcribe", "which_clip") if audio.changes_clips else ()
    if images.changes_images:
        tasks += ("caption", "which", "fewshot", "read_aloud")
        tasks += ("draw",) if images.targets else ()
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
    """'images', 'audio', 'documents' or 'text': where a task's records come from."""
    return ROW_TASKS[task].source


def image_sample(task: str, record: ImageRecord, rng: np.random.Generator) -> Sample:
    """draw: a prompt, then the image as a target. caption: the image, then a caption.

    Args:
      task: 'draw' or 'caption'.
      record: the image, and texts of which one is drawn.
      rng: makes one draw.
    """
    text = _drawn(record.prompts if task == "draw" else record.captions, rng)
    image = ImagePart(record.pixels, is_target=task == "draw")
    return Sample((text, image) if task == "draw" else (image, text), record.where)


def audio_sample(task: str, record: AudioRecord, mel: np.ndarray) -> Sample:
    """speak: the transcript, then the clip as a target. transcribe: the clip, then its transcript.

    Args:
      task: 'speak' or 'transcribe'.
      record: the transcript is its.
      mel: its spectrogram, normalised, or one of a changed clip.
    """
    clip = _clip_part(record, mel, is_target=task == "speak")
    parts = (record.transcript, clip) if task == "speak" else (clip, record.transcript)
    return Sample(parts, record.where)


def fewshot_sample(records: Sequence[ImageRecord], rng: np.random.Generator) -> Sample:
    """Each image with a caption behind it; the last one gives the row its name."""
    pairs = ((ImagePart(record.pixels), _drawn(record.captions, rng)) for record in records)
    return Sample(tuple(itertools.chain.from_iterable(pairs)), records[-1].where)


def which_sample(
    text: str,
    place: int,
    media: Sequence[ImageRecord | tuple[AudioRecord, np.ndarray]],
    name: str,
) -> Sample:
    """Numbered media, `Which is three?`, and the number of the one that is. It alone is learned.

    Args:
      text: fits the medium at `place` alone.
      place: from 0.
      media: images, or clips with their spectrograms.
      name: for messages.
    """
    parts: list[Part | Given] = []
    for number, medium in enumerate(media, start=1):
        parts.append(Given(str(number)))
        if isinstance(medium, ImageRecord):
            parts.append(ImagePart(medium.pixels))
        else:
            parts.append(_clip_part(*medium))
    return Sample((*parts, Given(WHICH_QUESTION.format(text)), str(place + 1)), name)


def read_aloud_sample(image: ImageRecord, clip: AudioRecord, mel: np.ndarray) -> Sample:
    """The image, then the clip that says its caption as a target."""
    return Sample((ImagePart(image.pixels), _clip_part(clip, mel, is_target=True)), image.where)


def _drawn(texts: Sequence[str], rng: np.random.Generator) -> str:
    return texts[int(rng.integers(len(texts)))]


def _clip_part(record: AudioRecord, mel: np.ndarray, *, is_target: bool = False) -> AudioPart:
    return AudioPart(record.waveform, record.sample_rate_hz, record.is_voice, is_target, mel)


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
