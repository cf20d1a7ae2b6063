"""Rows with media by random access: row n is a function of the configuration and n."""

import dataclasses
import sys
import typing
from collections import OrderedDict

import grain
import numpy as np

from megatransformer_jax.config.data import DataConfig
from megatransformer_jax.data.augmentation.audio import augment_mel, augment_waveform
from megatransformer_jax.data.augmentation.image import augment_image
from megatransformer_jax.data.augmentation.random_draws import Purpose, generator_of
from megatransformer_jax.data.documents import in_order
from megatransformer_jax.data.media.encoding import (
    EncodedSample,
    RowShape,
    SampleError,
    check_fits,
    check_waveform,
    encode_sample,
)
from megatransformer_jax.data.media.formats import MediaFormats
from megatransformer_jax.data.media.records import AudioRecord, ImageRecord
from megatransformer_jax.data.media.tasks import (
    audio_sample,
    batch_tasks,
    image_sample,
    source_of,
    task_names,
    validation_rows,
)
from megatransformer_jax.data.media_tokenizer import MediaTokenizer
from megatransformer_jax.data.mel import normalized_mel
from megatransformer_jax.data.sources.combine import Records
from megatransformer_jax.data.sources.record import BadRecord

# Spectrograms kept per process: 256 MiB of 128 frames and 80 bins.
MAX_CACHED_MELS = 6500
# A row whose record is bad tries others this often, then stays empty.
MAX_ATTEMPTS = 10


class Row(typing.NamedTuple):
    """One row: None is padding, as a validation row is whose record is bad."""

    task: int
    content: EncodedSample | None
    bad_records: tuple[BadRecord, ...] = ()


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
        self.shape = RowShape(
            config.sequence_length, config.media.images_per_row, config.media.audio_per_row
        )
        self._mels: OrderedDict[int, tuple[AudioRecord, np.ndarray]] = OrderedDict()

    def make(
        self, task: str, index: int, number: int, rng: np.random.Generator
    ) -> EncodedSample | BadRecord:
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
                content: EncodedSample = self.sources["text"][index]
                return content
            make = self._image_sample if kind == "images" else self._audio_sample
            sample = make(task, index, number, rng)
            if isinstance(sample, BadRecord):
                return sample
            content = encode_sample(sample, self._tokenizer, self._formats)
            check_fits(content, sample.name, self.shape)
            return content
        except SampleError as error:
            where, _, problem = str(error).partition(": ")
            return BadRecord(where, problem)

    def _image_sample(
        self, task: str, index: int, number: int, rng: np.random.Generator
    ) -> typing.Any:
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
    ) -> typing.Any:
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
        if isinstance(content, BadRecord):
            return Row(task, None, (content,))
        return Row(task, content)
