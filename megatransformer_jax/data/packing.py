"""Fills rows of a fixed length with tokenised documents.

A document of n tokens takes n + 1 positions: the start token and its tokens are read, its tokens
and the end token are predicted. So every token is read once and predicted once.
"""

import itertools
import typing
from collections.abc import Callable, Iterator

import numpy as np
from absl import logging

from megatransformer_jax.data.augmentation.text import ids_to_predict, ids_to_read
from megatransformer_jax.types import Batch

# The token ids of the documents from the n-th on; an empty document takes no place in any row.
OpenDocuments = Callable[[int], Iterator[np.ndarray]]


class SpecialIds(typing.NamedTuple):
    """The ids that packing adds."""

    pad: int
    bos: int
    eos: int


class Row(typing.NamedTuple):
    """One row of a batch; see `types.Batch`."""

    tokens: np.ndarray  # int32 [T]
    targets: np.ndarray  # int32 [T]
    loss_mask: np.ndarray  # float32 [T]
    segment_ids: np.ndarray  # int32 [T]
    positions: np.ndarray  # int32 [T]

    @classmethod
    def empty(cls, length: int, pad: int) -> "Row":
        """A row of padding."""
        return cls(
            tokens=np.full(length, pad, np.int32),
            targets=np.full(length, pad, np.int32),
            loss_mask=np.zeros(length, np.float32),
            segment_ids=np.zeros(length, np.int32),
            positions=np.zeros(length, np.int32),
        )

    def write(self, start: int, segment: int, tokens: np.ndarray, targets: np.ndarray) -> None:
        """Puts one segment at `start`."""
        place = slice(start, start + len(tokens))
        self.tokens[place] = tokens
        self.targets[place] = targets
        self.loss_mask[place] = 1
        self.segment_ids[place] = segment
        self.positions[place] = np.arange(len(tokens))


class PackedRows:
    """Rows filled from the stream of documents; only the last one of a finite stream has padding.

    Documents follow each other in order. One that does not fit is split and goes on in the next
    row as a segment of its own, with positions from 0. The state is the next unread token.
    """

    def __init__(self, open_documents: OpenDocuments, ids: SpecialIds, length: int):
        self._open_documents = open_documents
        self._ids = ids
        self._length = length
        self._document = self._offset = 0
        self._documents: Iterator[np.ndarray] | None = None  # not opened before it is needed
        self._current: tuple[np.ndarray, np.ndarray] | None = None  # read and predicted ids

    def __iter__(self) -> Iterator[Row]:
        return self

    def __next__(self) -> Row:
        row = Row.empty(self._length, self._ids.pad)
        filled = 0
        for segment in itertools.count(1):
            unread = self._unread() if filled < self._length else None
            if unread is None:
                break
            tokens, targets = (part[: self._length - filled] for part in unread)
            row.write(filled, segment, tokens, targets)
            filled += len(tokens)
            self._offset += len(tokens)
        if filled == 0:
            raise StopIteration
        return row

    def get_state(self) -> dict[str, int]:
        """Number of the current document and how many of its positions are used up."""
        return {"document": self._document, "offset": self._offset}

    def set_state(self, state: dict[str, int]) -> None:
        """Goes on from there. The stream is opened again only when the next row is asked for."""
        self._document = state["document"]
        self._offset = state["offset"]
        self._documents = None
        self._current = None

    def _unread(self) -> tuple[np.ndarray, np.ndarray] | None:
        """What is left of the current document, or the next one; None at the end of the stream."""
        if self._documents is None:
            self._documents = self._open_documents(self._document)
        while True:
            if self._current is None:
                document = next(self._documents, None)
                if document is None:
                    return None
                self._current = inputs_and_targets(document, self._ids)
            tokens, targets = self._current
            if self._offset < len(tokens):
                return tokens[self._offset :], targets[self._offset :]
            self._document += 1
            self._offset = 0
            self._current = None


class Cuts:
    """Counts and logs what is lost where documents are cut at the end of a row."""

    def __init__(self, packing: str, length: int):
        self.num_cut = 0
        self.tokens_lost = 0
        self._packing = packing
        self._length = length

    def count(self, excess: int) -> None:
        """Notes a document that is longer than a row by this many positions, if it is."""
        if excess <= 0:
            return
        self.num_cut += 1
        self.tokens_lost += excess
        if self.num_cut & (self.num_cut - 1) == 0:
            logging.warning(
                "data.packing=%r cut %d documents at data.sequence_length=%d so far and lost "
                "%d tokens; packing='pack' loses none.",
                self._packing,
                self.num_cut,
                self._length,
                self.tokens_lost,
            )


class PaddedRows:
    """One document per row, cut at the row's length; the cut is counted and logged."""

    def __init__(self, open_documents: OpenDocuments, ids: SpecialIds, length: int):
        self._open_documents = open_documents
        self._ids = ids
        self._length = length
        self.cuts = Cuts("pad", length)
        self._document = 0
        self._documents: Iterator[np.ndarray] | None = None  # not opened before it is needed

    def __iter__(self) -> Iterator[Row]:
        return self

    def __next__(self) -> Row:
        if self._documents is None:
            self._documents = self._open_documents(self._document)
        for document in self._documents:
            self._document += 1
            if not len(document):
                continue
            self.cuts.count(num_positions(document) - self._length)
            return document_row(document, self._ids, self._length)
        raise StopIteration

    def get_state(self) -> dict[str, int]:
        """Number of the next document."""
        return {"document": self._document}

    def set_state(self, state: dict[str, int]) -> None:
        """Goes on with that document."""
        self._document = state["document"]
        self._documents = None


def document_row(document: np.ndarray, ids: SpecialIds, length: int) -> Row:
    """A row that holds one document, cut if it is longer."""
    tokens, targets = inputs_and_targets(document, ids)
    row = Row.empty(length, ids.pad)
    row.write(0, 1, tokens[:length], targets[:length])
    return row


def num_positions(document: np.ndarray) -> int:
    """Positions that a document with tokens takes."""
    return len(document) + 1


def inputs_and_targets(document: np.ndarray, ids: SpecialIds) -> tuple[np.ndarray, np.ndarray]:
    """What is read and what is predicted at each position, both [n + 1]; an empty one is [0]."""
    if not len(document):
        return document, document
    read, predicted = ids_to_read(document, ids.pad), ids_to_predict(document)
    return np.concatenate(([ids.bos], read)), np.concatenate((predicted, [ids.eos]))


def stack(rows: list[Row]) -> Batch:
    """Rows as the arrays of a batch."""
    return Batch._make([*(np.stack(parts) for parts in zip(*rows, strict=True)), None])
