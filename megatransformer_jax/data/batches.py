"""Streams of batches that can be resumed, for text and for reasoning problems."""

import dataclasses
import sys
import typing
from collections.abc import Iterator
from typing import Any

import grain

from megatransformer_jax.data.documents import Documents, in_order, read
from megatransformer_jax.data.packing import PackedRows, PaddedRows, Row, stack
from megatransformer_jax.data.reasoning import ProblemSet
from megatransformer_jax.data.sources.combine import Records
from megatransformer_jax.types import Batch

Element = typing.TypeVar("Element")


@dataclasses.dataclass(frozen=True)
class Share:
    """The rows of each global batch that one process makes: a block, in the order of processes."""

    batch_size: int
    process_index: int = 0
    process_count: int = 1

    @property
    def rows(self) -> slice:
        """Their place in the global batch."""
        return self.rows_of(self.batch_size)

    def rows_of(self, num_rows: int) -> slice:
        """Their place in a global batch of another number of rows."""
        size = num_rows // self.process_count
        return slice(self.process_index * size, (self.process_index + 1) * size)


class BatchStream(typing.Protocol):
    """Batches with a state, which is a JSON-able dict: where the next batch starts.

    They are a `Batch`, a `WaveformBatch` or an `ImageBatch`.
    """

    def __next__(self) -> Any: ...

    def get_state(self) -> dict[str, Any]:
        """Where the next batch starts; the same in every process."""
        ...

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes on from there."""
        ...

    def close(self) -> None:
        """Stops worker processes."""
        ...


class TextBatches:
    """Batches of rows of text. Every process packs the whole stream and keeps its share of it.

    So the global batches, and the state, are the same for every number of processes.
    """

    def __init__(
        self, documents: Documents, rows: PackedRows | PaddedRows, share: Share, empty: Row
    ):
        self._documents = documents
        self._rows = rows
        self._share = share
        self._empty = empty

    def __next__(self) -> Batch:
        rows = []
        for row in self._rows:
            rows.append(row)
            if len(rows) == self._share.batch_size:
                break
        if not rows:
            raise StopIteration
        rows += [self._empty] * (self._share.batch_size - len(rows))
        return stack(rows[self._share.rows])

    def get_state(self) -> dict[str, Any]:
        """The document and token that come next."""
        return self._rows.get_state()

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes on from there."""
        self._documents.close()
        self._rows.set_state(state)

    def close(self) -> None:
        """Stops the worker processes."""
        self._documents.close()


class NumberedStream(typing.Generic[Element]):
    """Elements of a source by random access, one after the other; the state is a number."""

    def __init__(self, source: Records[Element], num_workers: int):
        self._source = source
        self._num_workers = num_workers
        self._elements: grain.DatasetIterator | None = None
        self._batch = 0

    def __next__(self) -> Element:
        if self._batch >= len(self._source):
            raise StopIteration
        if self._elements is None:
            dataset = grain.MapDataset.source(self._source)
            self._elements = read(dataset, self._batch, self._num_workers)
        batch = next(self._elements)
        self._batch += 1
        return batch

    def get_state(self) -> dict[str, Any]:
        """The number of the next batch."""
        return {"batch": self._batch}

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes on with that batch."""
        self.close()
        self._batch = state["batch"]

    def close(self) -> None:
        """Stops the worker processes."""
        if self._elements is not None:
            self._elements.close()
            self._elements = None


class ProblemBatches(NumberedStream[Batch]):
    """Batches of reasoning problems. Each process generates its own share only."""

    def __init__(
        self,
        problems: ProblemSet,
        share: Share,
        *,
        seed: int,
        shuffle: bool,
        repeat: bool,
        num_workers: int,
    ):
        order = in_order(
            grain.MapDataset.range(len(problems)), seed=seed, shuffle=shuffle, repeat=repeat
        )
        super().__init__(_NumberedBatches(problems, order, share), num_workers)


@dataclasses.dataclass(frozen=True)
class _NumberedBatches:
    """One process's share of batch n, by random access."""

    problems: ProblemSet
    order: grain.MapDataset
    share: Share

    def __len__(self) -> int:
        # Endless orders have sys.maxsize elements.
        return min(-(-len(self.order) // self.share.batch_size), sys.maxsize)

    def __getitem__(self, number: int) -> Batch:
        first = number * self.share.batch_size
        rows = range(first, min(first + self.share.batch_size, len(self.order)))
        mine = [int(self.order[row]) for row in rows[self.share.rows]]
        return self.problems.batch(mine, self.share.batch_size // self.share.process_count)


def first_batches(stream: Iterator[Batch], limit: int | None) -> list[Batch]:
    """Up to `limit` batches of a stream; all of them if None."""
    batches: list[Batch] = []
    while limit is None or len(batches) < limit:
        batch = next(stream, None)
        if batch is None:
            break
        batches.append(batch)
    return batches
