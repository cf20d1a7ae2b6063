"""Batches of one medium without text, which can be resumed: for vocoders and autoencoders."""

import dataclasses
import sys
import typing

import grain
import numpy as np

from megatransformer_jax.config.data import DataConfig
from megatransformer_jax.data.augmentation.random_draws import Purpose, generator_of
from megatransformer_jax.data.batches import NumberedStream, Share
from megatransformer_jax.data.documents import in_order
from megatransformer_jax.data.pipeline import Pipeline
from megatransformer_jax.data.sources.combine import Records
from megatransformer_jax.data.sources.record import BadRecord, BadRecordPolicy

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
class _NumberedBatches(typing.Generic[Made_co]):
    """One process's share of batch n, and the bad records that were met on the way."""

    records: Records[typing.Any]
    order: grain.MapDataset
    row_format: RowFormat[Made_co]
    share: Share
    seed: int

    def __len__(self) -> int:
        # Endless orders have sys.maxsize elements.
        return min(-(-len(self.order) // self.share.batch_size), sys.maxsize)

    def __getitem__(self, number: int) -> tuple[Made_co, tuple[BadRecord, ...]]:
        first = number * self.share.batch_size
        mine = range(first, first + self.share.batch_size)[self.share.rows]
        bad: list[BadRecord] = []
        made = [self._row(n, bad) for n in mine if n < len(self.order)]
        rows = [row for row in made if row is not None]
        return self.row_format.batch(rows, len(mine)), tuple(bad)

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
        source = _NumberedBatches(records, order, row_format, share, seed)
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
    config: DataConfig,
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
