"""Streams of batches that can be resumed: text, reasoning problems, buckets of like length."""

import collections
import dataclasses
import functools
import json
import sys
import typing
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import grain
import numpy as np

from megatransformer_jax.config.model import ModelConfig
from megatransformer_jax.config.option import UserError
from megatransformer_jax.data.documents import Documents, in_order, read
from megatransformer_jax.data.packing import (
    Cuts,
    PackedRows,
    PaddedRows,
    Row,
    SpecialIds,
    document_row,
    num_positions,
    stack,
)
from megatransformer_jax.data.reasoning import ProblemSet
from megatransformer_jax.data.sources.record import BadRecordPolicy, Records
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
        batch = self._make()
        self._batch += 1
        return batch

    def _make(self) -> Element:
        if not self._num_workers:
            return self._source[self._batch]
        if self._elements is None:
            dataset = grain.MapDataset.source(self._source)
            self._elements = read(dataset, self._batch, self._num_workers)
        return next(self._elements)

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


@dataclasses.dataclass(frozen=True)
class NumberedBatches(typing.Generic[Element]):
    """One process's share of batch n, by random access. Worker processes get it pickled.

    Attributes:
      num_rows: of all batches together; endless rows have sys.maxsize.
      share: of this process.
      make: a batch of the rows with these numbers, filled up with padding to a number of rows.
    """

    num_rows: int
    share: Share
    make: Callable[[list[int], int], Element]

    def __len__(self) -> int:
        return min(-(-self.num_rows // self.share.batch_size), sys.maxsize)

    def __getitem__(self, number: int) -> Element:
        first = number * self.share.batch_size
        mine = range(first, first + self.share.batch_size)[self.share.rows]
        return self.make([row for row in mine if row < self.num_rows], len(mine))


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
        make = functools.partial(_problem_batch, problems, order)
        super().__init__(NumberedBatches(len(order), share, make), num_workers)


def _problem_batch(
    problems: ProblemSet, order: grain.MapDataset, rows: list[int], size: int
) -> Batch:
    return problems.batch([int(order[row]) for row in rows], size)


def first_batches(stream: Iterator[Batch], limit: int | None) -> list[Batch]:
    """Up to `limit` batches of a stream; all of them if None."""
    batches: list[Batch] = []
    while limit is None or len(batches) < limit:
        batch = next(stream, None)
        if batch is None:
            break
        batches.append(batch)
    return batches


# ------------------------------------------------------------------------------
# What training iterates over: a stream with a thread that makes batches ahead.


class Pipeline:
    """Batches of one process, made ahead by a thread, and resumable.

    Training is endless; validation is one pass in a fixed order, whose last batch is filled up
    with rows of padding. The state is that of the last batch returned, whatever was made ahead.

    Args:
      stream: of the batches.
      bad_records: what becomes of records that cannot be used.
      ahead: groups of batches that are made ahead.
      group: batches that the thread hands over at once. Small batches take less time to make than
        to hand over.

    Examples:
      with build_pipeline(config.data, tokenizer, split="train") as batches:
          batch = next(batches)
          state = batches.get_state()
    """

    def __init__(
        self, stream: BatchStream, bad_records: BadRecordPolicy, ahead: int, group: int = 1
    ):
        # A list, so that closing at the exit of Python can let go of grain's iterator: whatever is
        # left of it when modules are torn down complains on stderr, and its workers delay the exit.
        groups = _Groups(stream, group)
        self._iterators = [grain.experimental.ThreadPrefetchDatasetIterator(groups, ahead)]
        # Batches of the last group that are still to be returned, and where each of them ends.
        self._ready: collections.deque[tuple[Any, dict[str, Any] | None]] = collections.deque()
        self._state: dict[str, Any] | None = None
        self._finalizer = weakref.finalize(self, _close, self._iterators, stream)
        self.bad_records = bad_records

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        if not self._ready:
            self._ready.extend(next(self._iterator))
        batch, self._state = self._ready.popleft()
        return batch

    def get_state(self) -> dict[str, Any]:
        """A JSON-able dict: where the batch after the last returned one starts.

        It is the same in every process and for every number of processes and workers.
        """
        return dict(self._iterator.get_state() if self._state is None else self._state)

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes on exactly where `get_state` was called.

        Raises:
          UserError: if the state comes from a pipeline of another kind.
        """
        mine = self._iterator.get_state()
        if state.keys() != mine.keys() or not all(
            _is_like(value, mine[name]) for name, value in state.items()
        ):
            raise UserError(
                f"the data state {json.dumps(state)} does not go with this data configuration, "
                f"whose states look like {json.dumps(mine)}. Use the configuration of the run "
                "that saved it, or start without it."
            )
        self._iterator.set_state(state)
        self._ready.clear()
        self._state = None

    def close(self) -> None:
        """Stops the thread and the worker processes; the pipeline cannot be used any more."""
        self._finalizer()

    @property
    def _iterator(self) -> grain.DatasetIterator:
        if not self._iterators:
            raise ValueError("the pipeline is closed; build a new one")
        return self._iterators[0]

    def __enter__(self) -> "Pipeline":
        return self

    def __exit__(self, *unused: object) -> None:
        self.close()


class _Groups:
    """Some batches of a stream at a time, each with the state of the stream behind it.

    The last one of a whole group has none: its state is that of the stream of groups.
    """

    def __init__(self, stream: BatchStream, size: int):
        self._stream = stream
        self._size = size

    def __next__(self) -> list[tuple[Any, dict[str, Any] | None]]:
        found: list[tuple[Any, dict[str, Any] | None]] = []
        for number in range(1, self._size + 1):
            try:
                batch = next(self._stream)
            except StopIteration:
                if not found:
                    raise
                break
            is_last = number == self._size
            found.append((batch, None if is_last else self._stream.get_state()))
        return found

    def __iter__(self) -> Iterator[Any]:
        return self

    def get_state(self) -> dict[str, Any]:
        return self._stream.get_state()

    def set_state(self, state: dict[str, Any]) -> None:
        self._stream.set_state(state)

    def close(self) -> None:
        self._stream.close()


def _is_like(value: Any, mine: int | list[int]) -> bool:
    """Whether a value of a state is a number, or a list of numbers, as mine is."""
    if isinstance(mine, list):
        return isinstance(value, list) and all(_is_like(item, 0) for item in value)
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _close(iterators: list[grain.DatasetIterator], stream: BatchStream) -> None:
    while iterators:
        iterators.pop().close()
    stream.close()


# ------------------------------------------------------------------------------
# Batches whose rows have a length that suits their documents, so that little of them is padding.
#
# Documents of like length are collected until there are enough of them for a batch. There is one
# static shape per length, and batches of shorter rows have more of them.


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


# ------------------------------------------------------------------------------
# Batches of your own.


def check_batch(batch: Any, model: ModelConfig, accumulation: int) -> Batch:
    """A batch that somebody else made, with arrays of the declared types.

    Args:
      batch: a `Batch` on the host; lists and other whole-number types are converted.
      model: that is to read it.
      accumulation: parts that its rows are divided into.

    Raises:
      UserError: naming the field that cannot be used, and what it may hold.
    """
    if not isinstance(batch, Batch):
        raise UserError(f"a batch is an mt.Batch, not a {type(batch).__name__}.")
    shape = np.shape(batch.tokens)
    arrays: dict[str, np.ndarray] = {}
    for name, value in batch._asdict().items():
        if name != "media":
            arrays[name] = array = _numbers(name, value)
            if array.shape != shape:
                raise UserError(f"batch.{name} has the shape {array.shape}, and tokens {shape}.")
    if len(shape) != 2 or 0 in shape or shape[0] % accumulation:
        raise UserError(
            f"batch.tokens has the shape {shape}; it must be [rows, tokens], rows a multiple "
            f"of train.accumulation={accumulation}."
        )
    if shape[1] > model.max_length:
        raise UserError(
            f"batch.tokens has rows of {shape[1]} tokens, and the model reads at most "
            f"max_length={model.max_length}; shorten them."
        )
    last_id = model.vocab_size - 1
    last_position = model.max_length - 1
    for name, last in (
        ("tokens", last_id),
        ("targets", last_id),
        ("segment_ids", shape[1]),
        ("positions", last_position),
    ):
        _check_whole(name, arrays[name], last)
        arrays[name] = arrays[name].astype(np.int32)
    mask = arrays["loss_mask"] = arrays["loss_mask"].astype(np.float32)
    if not (np.isfinite(mask).all() and (mask >= 0).all() and mask.any()):
        raise UserError(
            "batch.loss_mask must hold finite weights of at least 0, and one above 0; it has "
            f"{mask.min()} to {mask.max()}."
        )
    if batch.media is not None and not model.has_media:
        raise UserError("batch.media is given, but the model reads text alone; leave it None.")
    return Batch(**arrays, media=batch.media)


def _numbers(name: str, value: Any) -> np.ndarray:
    try:
        array = np.asarray(value)
    except ValueError:
        array = np.asarray(None)
    if not (np.issubdtype(array.dtype, np.number) or array.dtype == bool):
        raise UserError(f"batch.{name} must be an array of numbers, [rows, tokens].")
    return array


def _check_whole(name: str, array: np.ndarray, last: int) -> None:
    what = "ids are" if name in ("tokens", "targets") else "it holds"
    if not np.issubdtype(array.dtype, np.integer):
        raise UserError(f"batch.{name} holds {array.dtype}; {what} whole numbers from 0 to {last}.")
    wrong = array[(array < 0) | (array > last)]
    if wrong.size:
        raise UserError(f"batch.{name} holds {wrong[0]}; {what} whole numbers from 0 to {last}.")
