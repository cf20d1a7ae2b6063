"""The stream of tokenised documents: order, epochs, worker processes."""

import dataclasses
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator

import grain
import numpy as np
from absl import flags

from megatransformer_jax.config.data import AugmentationConfig
from megatransformer_jax.config.option import UserError
from megatransformer_jax.data.augmentation.text import (
    FailedAugmentation,
    TextAugmentation,
    TokenDropout,
)
from megatransformer_jax.data.sources.record import BadRecord, BadRecordPolicy, TextSource
from megatransformer_jax.data.tokenizer import Tokenizer

ELEMENTS_AHEAD_PER_WORKER = 16
# Smaller arrays go through the pipe. Shared memory that is in flight at the end of a run leaks.
SHARED_MEMORY_BYTES = 4 << 20


@dataclasses.dataclass(frozen=True)
class TokenizeDocument(grain.transforms.Map):
    """Text to token ids; what is not text passes as it is. Runs in the worker processes."""

    tokenizer: Tokenizer

    def map(
        self, record: str | BadRecord | FailedAugmentation
    ) -> np.ndarray | BadRecord | FailedAugmentation:
        """int32 [n]."""
        if not isinstance(record, str):
            return record
        return np.asarray(self.tokenizer.encode(record), np.int32)


def in_order(
    dataset: grain.MapDataset, *, seed: int, shuffle: bool, repeat: bool
) -> grain.MapDataset:
    """The elements of one epoch or of endless ones, in a new random order each if `shuffle`."""
    if shuffle:
        dataset = dataset.seed(seed).shuffle()
    return dataset.repeat() if repeat else dataset


def read(dataset: grain.MapDataset, start: int, num_workers: int) -> grain.DatasetIterator:
    """Elements from number `start` on, made by `num_workers` processes or else by this one.

    The order does not depend on the number of workers.
    """
    # No threads of grain's own: the pipeline has one that works ahead, and workers are processes.
    options = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    elements = dataset.slice(slice(start, None)).to_iter_dataset(options)
    if num_workers:
        # grain's workers read absl flags of grain's own. Where no absl app has parsed any, as in
        # a notebook, they have their defaults.
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()
        elements = grain.experimental.WithOptionsIterDataset(
            elements, grain.experimental.DatasetOptions(min_shm_size=SHARED_MEMORY_BYTES)
        ).mp_prefetch(
            grain.MultiprocessingOptions(
                num_workers=num_workers, per_worker_buffer_size=ELEMENTS_AHEAD_PER_WORKER
            ),
            worker_init_fn=_live_with_parent,
        )
    return iter(elements)


def _live_with_parent(worker_index: int, worker_count: int) -> None:
    """Lets a worker live as long as the training process, even if that was killed with SIGKILL.

    A terminal, `timeout` and schedulers send their signals to all processes of a group. A worker
    that dies of one in the middle of a message leaves the training process waiting for the rest of
    it, forever; that process ends its workers itself.
    """
    del worker_index, worker_count
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    end_with_parent()


def end_with_parent() -> None:
    """Ends this worker process when the process that started it ends, however that ends."""

    def wait() -> None:
        parent = multiprocessing.parent_process()
        assert parent is not None, "this runs in worker processes only"
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


class Documents:
    """Opens the stream of documents at any number. One is open at a time.

    With `augmentation` each document is changed as that says, again in each epoch; hidden tokens
    are as `token_dropout` describes them.
    """

    def __init__(
        self,
        source: TextSource,
        tokenizer: Tokenizer,
        policy: BadRecordPolicy,
        *,
        seed: int,
        shuffle: bool,
        repeat: bool,
        num_workers: int,
        augmentation: AugmentationConfig | None = None,
    ):
        self._size = len(source)
        ordered = in_order(
            grain.MapDataset.source(source), seed=seed, shuffle=shuffle, repeat=repeat
        )
        if augmentation is not None and augmentation.changes_text:
            ordered = ordered.map_with_index(TextAugmentation.from_config(augmentation, seed))
        self._dataset = ordered.map(TokenizeDocument(tokenizer))
        if augmentation is not None and augmentation.token_dropout:
            self._dataset = self._dataset.map_with_index(
                TokenDropout(augmentation.token_dropout, seed)
            )
        self._policy = policy
        self._num_workers = num_workers
        self._elements: grain.DatasetIterator | None = None

    def open(self, start: int) -> Iterator[np.ndarray]:
        """Token ids of the documents from number `start` on; a skipped record is empty.

        Raises:
          BadRecordError: for a bad record, if the policy says so.
          UserError: if a whole epoch holds no token, or a document cannot be augmented.
        """
        self.close()
        if start >= len(self._dataset):
            return
        self._elements = read(self._dataset, start, self._num_workers)
        empty_in_row = 0
        for document in self._elements:
            if isinstance(document, FailedAugmentation):
                raise UserError(document.message)
            if isinstance(document, BadRecord):
                self._policy.handle(document)
                document = np.zeros(0, np.int32)
            empty_in_row = 0 if len(document) else empty_in_row + 1
            if empty_in_row == self._size:
                raise UserError(
                    f"none of the {self._size} documents holds text ({self._policy.count} bad "
                    f"records; the first: {self._policy.first}). Give a corpus with text."
                )
            yield document

    def at(self, number: int) -> np.ndarray:
        """Token ids of one document that has been read before, made in this process.

        The stream that is open stays as it is.
        """
        document = self._dataset[number]
        assert isinstance(document, np.ndarray), "a bad record is not a document"
        return document

    def close(self) -> None:
        """Stops the worker processes."""
        if self._elements is not None:
            self._elements.close()
            self._elements = None
