"""Batches whose rows have a length that suits their documents, so that little of them is padding.

Documents of like length are collected until there are enough of them for a batch. There is one
static shape per length, and batches of shorter rows have more of them.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from megatransformer_jax.data.batches import Share
from megatransformer_jax.data.documents import Documents
from megatransformer_jax.data.packing import (
    Cuts,
    Row,
    SpecialIds,
    document_row,
    num_positions,
    stack,
)
from megatransformer_jax.types import Batch


class BucketBatches:
    """Batches of rows of text with one document each (a `BatchStream`).

    A document goes to the bucket of the shortest rows that it fits in; one that is longer than
    all is cut. A bucket that has the rows of a batch is emitted and empty again. At the end of a
    finite stream the buckets are emitted as they are, shortest first, filled up with rows of
    padding. Every process does this for the whole stream and keeps its share of the rows.

    Args:
      documents: the stream.
      ids: what is added to the documents.
      shapes: rows and length of the batches, lengths increasing (`DataConfig.batch_shapes`).
      share: which rows this process keeps.
    """

    def __init__(
        self,
        documents: Documents,
        ids: SpecialIds,
        shapes: Sequence[tuple[int, int]],
        share: Share,
    ):
        self._documents = documents
        self._ids = ids
        self._num_rows = {length: rows for rows, length in shapes}
        self._share = share
        self.cuts = Cuts("bucket", max(self._num_rows))
        self._document = 0
        self._stream: Iterator[np.ndarray] | None = None  # not opened before it is needed
        # Numbers and rows of the documents that no batch had yet.
        self._waiting: dict[int, list[tuple[int, Row]]] = {length: [] for length in self._num_rows}
        self._unread: list[int] = []  # numbers of a state whose documents are still to be read

    def __next__(self) -> Batch:
        self._read_waiting()
        if self._stream is None:
            self._stream = self._documents.open(self._document)
        for document in self._stream:
            number = self._document
            self._document += 1
            if not len(document):
                continue
            self.cuts.count(num_positions(document) - max(self._num_rows))
            length = self._add(number, document)
            if len(self._waiting[length]) == self._num_rows[length]:
                return self._emit(length)
        for length, waiting in self._waiting.items():
            if waiting:
                return self._emit(length)
        raise StopIteration

    def get_state(self) -> dict[str, Any]:
        """The number of the next document, and those of the documents that wait in buckets."""
        numbers = [number for waiting in self._waiting.values() for number, _ in waiting]
        return {"document": self._document, "waiting": sorted(numbers + self._unread)}

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes on from there; what waited is read again when the next batch is asked for."""
        self.close()
        self._document = state["document"]
        self._unread = list(state["waiting"])
        for waiting in self._waiting.values():
            waiting.clear()
        self._stream = None

    def close(self) -> None:
        """Stops the worker processes."""
        self._documents.close()

    def _read_waiting(self) -> None:
        # In ascending order, as they were collected.
        for number in self._unread:
            self._add(number, self._documents.at(number))
        self._unread = []

    def _add(self, number: int, document: np.ndarray) -> int:
        """Puts a document into its bucket and returns the bucket's length."""
        fitting = (length for length in self._waiting if num_positions(document) <= length)
        length = next(fitting, max(self._num_rows))
        self._waiting[length].append((number, document_row(document, self._ids, length)))
        return length

    def _emit(self, length: int) -> Batch:
        rows = [row for _, row in self._waiting[length]]
        self._waiting[length].clear()
        num_rows = self._num_rows[length]
        rows += [Row.empty(length, self._ids.pad)] * (num_rows - len(rows))
        return stack(rows[self._share.rows_of(num_rows)])
