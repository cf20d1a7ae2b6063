"""Batches with media, which can be resumed."""

import dataclasses
import sys

from megatransformer_jax.config.data import DataConfig
from megatransformer_jax.config.option import UserError
from megatransformer_jax.data.batches import NumberedStream, Share
from megatransformer_jax.data.media.build import build_media_sources
from megatransformer_jax.data.media.encoding import RowShape, make_batch
from megatransformer_jax.data.media.formats import MediaFormats
from megatransformer_jax.data.media.rows import Row, RowMaker, TrainingRows, ValidationRows
from megatransformer_jax.data.media_tokenizer import MediaTokenizer
from megatransformer_jax.data.sources.combine import Records
from megatransformer_jax.data.sources.record import BadRecord, BadRecordPolicy
from megatransformer_jax.types import Batch

NumberedBatch = tuple[Batch, tuple[BadRecord, ...]]


@dataclasses.dataclass(frozen=True)
class _NumberedBatches:
    """One process's share of batch n, and the bad records that were met on the way."""

    rows: Records[Row]
    share: Share
    shape: RowShape
    formats: MediaFormats
    pad_id: int

    def __len__(self) -> int:
        # Endless rows have sys.maxsize elements.
        return min(-(-len(self.rows) // self.share.batch_size), sys.maxsize)

    def __getitem__(self, number: int) -> NumberedBatch:
        first = number * self.share.batch_size
        mine = range(first, first + self.share.batch_size)[self.share.rows]
        padding = Row(0, None)
        rows = [self.rows[n] if n < len(self.rows) else padding for n in mine]
        batch = make_batch(
            [row.content for row in rows],
            [row.task for row in rows],
            self.shape,
            self.formats,
            self.pad_id,
        )
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
        source = _NumberedBatches(rows, share, maker.shape, formats, tokenizer.pad_id)
        self._stream: NumberedStream[NumberedBatch] = NumberedStream(source, config.num_workers)
        self._bad_records = bad_records

    def __next__(self) -> Batch:
        batch, bad_records = next(self._stream)
        for record in bad_records:
            self._bad_records.handle(record)
        if bad_records and not batch.segment_ids.any():
            raise UserError(
                f"no row of a batch could be made; {len(bad_records)} records of it are bad, the "
                f"first: {bad_records[0]} Mend the data."
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
