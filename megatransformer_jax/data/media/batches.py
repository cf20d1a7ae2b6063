"""Batches with media, and batches of one medium without text; both can be resumed."""

import dataclasses
import functools
import typing

import grain
import numpy as np

from megatransformer_jax.config.data import (
    ClipDataConfig,
    DataConfig,
    LoaderConfig,
    PictureDataConfig,
)
from megatransformer_jax.config.image import ImageConfig
from megatransformer_jax.config.option import UserError
from megatransformer_jax.config.vocoder import VocoderConfig
from megatransformer_jax.data.augmentation.text import FailedAugmentation
from megatransformer_jax.data.batches import (
    NumberedBatches,
    NumberedStream,
    Pipeline,
    Share,
)
from megatransformer_jax.data.documents import in_order
from megatransformer_jax.data.media.build import (
    build_audio_source,
    build_image_source,
    build_media_sources,
)
from megatransformer_jax.data.media.encoding import RowShape, make_batch
from megatransformer_jax.data.media.records import AudioRecord, ImageRecord, MediaFormats
from megatransformer_jax.data.media.rows import Row, RowMaker, TrainingRows, ValidationRows
from megatransformer_jax.data.media_tokenizer import MediaTokenizer
from megatransformer_jax.data.sources.record import BadRecord, BadRecordPolicy, Records
from megatransformer_jax.streams import Purpose, generator_of
from megatransformer_jax.types import Batch, ImageBatch, WaveformBatch

# ------------------------------------------------------------------------------
# Rows with media.

NumberedBatch = tuple[Batch, tuple[BadRecord | FailedAugmentation, ...]]


def _batch_of_rows(
    records: Records[Row],
    shape: RowShape,
    formats: MediaFormats,
    pad_id: int,
    numbers: list[int],
    size: int,
) -> NumberedBatch:
    """A batch, and the bad records or failed augmentations that were met on the way."""
    rows = [records[number] for number in numbers]
    rows += [Row(0, None)] * (size - len(rows))
    contents, tasks = [row.content for row in rows], [row.task for row in rows]
    batch = make_batch(contents, tasks, shape, formats, pad_id)
    return batch, tuple(record for row in rows for record in row.bad_records)


class MediaBatches:
    """Batches of rows with media; each process makes its share only, and counts its bad records.

    The state is the number of the next batch.
    """

    def __init__(
        self,
        config: DataConfig,
        tokenizer: MediaTokenizer,
        formats: MediaFormats,
        split: str,
        share: Share,
        bad_records: BadRecordPolicy,
    ):
        is_training = split == "train"
        sources = build_media_sources(config, tokenizer, formats, split)
        maker = RowMaker(config, tokenizer, formats, sources, augments=is_training)
        rows: Records[Row] = (TrainingRows if is_training else ValidationRows)(maker, config)
        make = functools.partial(_batch_of_rows, rows, maker.shape, formats, tokenizer.pad_id)
        source = NumberedBatches(len(rows), share, make)
        self._stream: NumberedStream[NumberedBatch] = NumberedStream(source, config.num_workers)
        self._bad_records = bad_records

    def __next__(self) -> Batch:
        batch, bad_records = next(self._stream)
        for record in bad_records:
            if isinstance(record, FailedAugmentation):
                raise UserError(record.message)
            self._bad_records.handle(record)
        if bad_records and not batch.segment_ids.any():
            raise UserError(
                f"no row of a batch could be made; {len(bad_records)} records of it are bad, the "
                f"first: {bad_records[0]} Fix the data."
            )
        return batch

    def get_state(self) -> dict[str, int]:
        """The number of the next batch."""
        return self._stream.get_state()

    def set_state(self, state: dict[str, int]) -> None:
        """Goes on with that batch."""
        self._stream.set_state(state)

    def close(self) -> None:
        """Stops the worker processes."""
        self._stream.close()


# ------------------------------------------------------------------------------
# Batches of one medium without text, which can be resumed: for vocoders and autoencoders.

# A row whose record is bad tries others this often.
MAX_ATTEMPTS = 10

Made_co = typing.TypeVar("Made_co", covariant=True)


class RowFormat(typing.Protocol[Made_co]):
    """From records to rows and from rows to a batch. Pickles, for worker processes."""

    def row(self, record: typing.Any, rng: np.random.Generator) -> np.ndarray | BadRecord:
        """What one row has of a record; `rng` draws which part."""
        ...

    def batch(self, rows: list[np.ndarray], size: int) -> Made_co:
        """`size` rows; those that are missing are padding."""
        ...


@dataclasses.dataclass(frozen=True)
class _MediumMaker(typing.Generic[Made_co]):
    """Makes a batch, and collects the bad records that it meets on the way."""

    records: Records[typing.Any]
    order: grain.MapDataset
    row_format: RowFormat[Made_co]
    seed: int

    def __call__(self, numbers: list[int], size: int) -> tuple[Made_co, tuple[BadRecord, ...]]:
        bad: list[BadRecord] = []
        made = [self._row(number, bad) for number in numbers]
        rows = [row for row in made if row is not None]
        return self.row_format.batch(rows, size), tuple(bad)

    def _row(self, number: int, bad: list[BadRecord]) -> np.ndarray | None:
        rng = generator_of(self.seed, number, Purpose.SEGMENTS)
        index = int(self.order[number])
        for _ in range(MAX_ATTEMPTS):
            record = self.records[index]
            row = record if isinstance(record, BadRecord) else self.row_format.row(record, rng)
            if not isinstance(row, BadRecord):
                return row
            bad.append(row)
            index = int(rng.integers(len(self.records)))
        return None


class MediumBatches(typing.Generic[Made_co]):
    """A `BatchStream`; each process makes its share only. The state is the next batch's number.

    Args:
      records: of one split.
      row_format: makes rows and batches.
      share: of this process.
      bad_records: counts records that cannot be used, or raises.
      seed: of order and draws.
      shuffle: visits records in a new order each epoch.
      repeat: endless; otherwise one pass.
      num_workers: processes that make batches.
    """

    def __init__(
        self,
        records: Records[typing.Any],
        row_format: RowFormat[Made_co],
        share: Share,
        bad_records: BadRecordPolicy,
        *,
        seed: int,
        shuffle: bool,
        repeat: bool,
        num_workers: int,
    ):
        order = in_order(
            grain.MapDataset.range(len(records)), seed=seed, shuffle=shuffle, repeat=repeat
        )
        make = _MediumMaker(records, order, row_format, seed)
        source = NumberedBatches(len(order), share, make)
        self._stream: NumberedStream[tuple[Made_co, tuple[BadRecord, ...]]] = NumberedStream(
            source, num_workers
        )
        self._bad_records = bad_records

    def __next__(self) -> Made_co:
        batch, bad_records = next(self._stream)
        for record in bad_records:
            self._bad_records.handle(record)
        return batch

    def get_state(self) -> dict[str, int]:
        """The number of the next batch."""
        return self._stream.get_state()

    def set_state(self, state: dict[str, int]) -> None:
        """Goes on with that batch."""
        self._stream.set_state(state)

    def close(self) -> None:
        """Stops the worker processes."""
        self._stream.close()


def medium_pipeline(
    records: Records[typing.Any],
    row_format: RowFormat[typing.Any],
    config: LoaderConfig,
    *,
    split: str,
    share: Share,
) -> Pipeline:
    """Batches of one process's share: 'train' is endless, 'validation' one pass in order."""
    is_training = split == "train"
    bad_records = BadRecordPolicy(config.on_bad_record)
    batches = MediumBatches(
        records,
        row_format,
        share,
        bad_records,
        seed=config.seed,
        shuffle=is_training and config.shuffle,
        repeat=is_training,
        num_workers=config.num_workers,
    )
    return Pipeline(batches, bad_records, config.prefetch_batches)


# ------------------------------------------------------------------------------
# Random pieces of clips, of one length, for training a vocoder.


@dataclasses.dataclass(frozen=True)
class WaveformSegments:
    """A piece of each clip, from a place that is drawn; a clip that is shorter is taken whole.

    Attributes:
      frames: of a piece.
      hop_samples: samples of a frame.
    """

    frames: int
    hop_samples: int

    def row(self, record: AudioRecord, rng: np.random.Generator) -> np.ndarray | BadRecord:
        """At most `frames` frames; whole ones, filled up with zeros at a clip's end."""
        waveform, length = record.waveform, self.frames * self.hop_samples
        if not len(waveform):
            return BadRecord(record.where, "the clip has no samples. Delete the record.")
        start = int(rng.integers(max(len(waveform) - length, 0) + 1))
        piece = waveform[start : start + length]
        return np.pad(piece, (0, -len(piece) % self.hop_samples))

    def batch(self, rows: list[np.ndarray], size: int) -> WaveformBatch:
        """Arrays of `size` rows, zeros where there is nothing."""
        waveforms = np.zeros((size, self.frames * self.hop_samples), np.float32)
        lengths = np.zeros(size, np.int32)
        for index, row in enumerate(rows):
            waveforms[index, : len(row)] = row
            lengths[index] = len(row) // self.hop_samples
        return WaveformBatch(waveforms, lengths)


def waveform_pipeline(
    config: ClipDataConfig,
    vocoder: VocoderConfig,
    *,
    split: str,
    process_index: int = 0,
    process_count: int = 1,
) -> Pipeline:
    """The pieces of `split` for one process: 'train' is endless, 'validation' one pass.

    Args:
      config: `media.audio` says where clips come from.
      vocoder: the rate of samples, the hop, and the frames of a piece.
      split: 'train' or 'validation'.
      process_index: which process this is, from 0.
      process_count: how many share each global batch.

    Raises:
      UserError: if the data cannot be read.
    """
    return medium_pipeline(
        build_audio_source(config, vocoder.mel, split),
        WaveformSegments(vocoder.segment_frames, vocoder.mel.hop_samples),
        config,
        split=split,
        share=Share(config.batch_size, process_index, process_count),
    )


# ------------------------------------------------------------------------------
# Images without text, for training an autoencoder.


@dataclasses.dataclass(frozen=True)
class WholeImages:
    """Each image as it is. A batch that is not full has its first images again.

    Attributes:
      shape: height, width, channels.
    """

    shape: tuple[int, int, int]

    def row(self, record: ImageRecord, rng: np.random.Generator) -> np.ndarray:
        """The pixels; nothing is drawn."""
        del rng
        return record.pixels

    def batch(self, rows: list[np.ndarray], size: int) -> ImageBatch:
        """Arrays of `size` rows; without any image they are grey."""
        if not rows:
            return ImageBatch(np.zeros((size, *self.shape), np.float32))
        return ImageBatch(np.stack([rows[index % len(rows)] for index in range(size)]))


def image_pipeline(
    config: PictureDataConfig,
    image: ImageConfig,
    *,
    split: str,
    process_index: int = 0,
    process_count: int = 1,
) -> Pipeline:
    """The images of `split` for one process: 'train' is endless, 'validation' one pass.

    Args:
      config: `media.images` says where images come from.
      image: the format.
      split: 'train' or 'validation'.
      process_index: which process this is, from 0.
      process_count: how many share each global batch.

    Raises:
      UserError: if the data cannot be read.
    """
    return medium_pipeline(
        build_image_source(config, image, split),
        WholeImages(image.shape),
        config,
        split=split,
        share=Share(config.batch_size, process_index, process_count),
    )
