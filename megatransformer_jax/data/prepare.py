"""Tokenises and packs a corpus into shards of rows, by several processes, once and for all.

Each shard is a block of the documents in their stored order, packed by itself. So the files depend
on the corpus and the options, not on the number of processes, and a preparation that was killed
goes on with the shards that are not finished. `token_rows.py` reads what is written here.
"""

import contextlib
import dataclasses
import hashlib
import itertools
import json
import multiprocessing
import os
import pathlib
import queue
import signal
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from absl import logging
from array_record.python import array_record_module

from megatransformer_jax.config.option import TRY_AGAIN, UserError
from megatransformer_jax.data.documents import end_with_parent
from megatransformer_jax.data.packing import PackedRows, PaddedRows
from megatransformer_jax.data.sources.record import BadRecord, BadRecordPolicy, TextSource
from megatransformer_jax.data.token_rows import (
    FORMAT,
    SPLITS,
    TOKENS_FILE,
    RowCodec,
    read_prepared,
    shard_name,
)
from megatransformer_jax.data.tokenizer import Tokenizer
from megatransformer_jax.failures import SaveFailed
from megatransformer_jax.storage import lock_opened, write_json

# What the shards of a folder have in common, while not all of them are finished.
PLAN_FILE = "plan.json"
# A reader keeps each file open that it has read from.
MAX_SHARDS = 256
# Their mean length stands for that of all documents.
_SAMPLED_DOCUMENTS = 256
# Random access reads whole groups of records.
_WRITER_OPTIONS = "group_size:1"
_PARTIAL = ".partial"
# How often workers say how far they are.
_REPORT_S = 0.2

# ------------------------------------------------------------------------------
# The plan: which documents go into which file.


@dataclasses.dataclass(frozen=True)
class ShardTask:
    """The documents of one file.

    Attributes:
      split: they belong to.
      name: of the file.
      start: number of the first document in the split.
      stop: number after that of the last.
    """

    split: str
    name: str
    start: int
    stop: int


@dataclasses.dataclass(frozen=True)
class Corpus:
    """What is prepared. Pickles, for worker processes.

    Attributes:
      sources: documents of each split.
      tokenizer: of the run.
      codec: writes the rows.
      packing: `data.packing`, 'pack' or 'pad'.
      on_bad_record: `data.on_bad_record`.
      origin: options and fingerprints that decide the documents, ready for JSON.
      tokenizer_kind: `data.tokenizer.kind`.
    """

    sources: Mapping[str, TextSource]
    tokenizer: Tokenizer
    codec: RowCodec
    packing: str
    on_bad_record: str
    origin: Mapping[str, Any]
    tokenizer_kind: str

    def plan(self, shard_bytes: int) -> dict[str, Any]:
        """What the files depend on, ready for JSON: the same plan makes the same files.

        Args:
          shard_bytes: of text in each file, about.
        """
        return {
            "format": FORMAT,
            "data.sequence_length": self.codec.length,
            "data.packing": self.packing,
            "data.tokenizer.kind": self.tokenizer_kind,
            "tokenizer": self.tokenizer.digest(),
            "vocab_size": self.tokenizer.vocab_size,
            **self.origin,
            "documents": {split: len(self.sources[split]) for split in SPLITS},
            "shards": {split: self._num_shards(split, shard_bytes) for split in SPLITS},
        }

    def tasks(self, plan: Mapping[str, Any]) -> list[ShardTask]:
        """The files of a plan."""
        tasks = []
        for split in SPLITS:
            documents, count = plan["documents"][split], plan["shards"][split]
            bounds = [number * documents // count for number in range(count + 1)]
            tasks += [
                ShardTask(split, shard_name(split, number, count), start, stop)
                for number, (start, stop) in enumerate(itertools.pairwise(bounds))
            ]
        return tasks

    def _num_shards(self, split: str, shard_bytes: int) -> int:
        source = self.sources[split]
        size = len(source)
        samples = min(size, _SAMPLED_DOCUMENTS)
        records = [source[number * (size - 1) // max(samples - 1, 1)] for number in range(samples)]
        lengths = [_num_bytes(record) for record in records if isinstance(record, str)]
        mean = sum(lengths) / max(len(lengths), 1)
        return max(1, min(size, MAX_SHARDS, round(mean * size / shard_bytes)))


def _num_bytes(text: str) -> int:
    return len(text.encode("utf-8", "surrogatepass"))


# ------------------------------------------------------------------------------
# One shard.

# Called with documents and bytes that were tokenised since the last call.
Report = Callable[[int, int], None]


def write_shard(corpus: Corpus, task: ShardTask, folder: pathlib.Path, report: Report) -> None:
    """Writes a file of rows, then next to it what it holds: only with that it counts as finished.

    Raises:
      BadRecordError: for a bad record, if the policy says so.
      SaveFailed: if the file cannot be written.
    """
    policy = BadRecordPolicy(corpus.on_bad_record)
    counts = {"documents": task.stop - task.start, "skipped": 0, "rows": 0, "tokens": 0}
    path = folder / task.name
    partial = folder / f".{task.name}.{os.getpid()}{_PARTIAL}"
    digest = hashlib.sha256()

    def open_documents(number: int) -> Iterator[np.ndarray]:
        source = corpus.sources[task.split]
        for index in range(task.start + number, task.stop):
            record = source[index]
            if isinstance(record, BadRecord):
                policy.handle(record)
                report(1, 0)
                yield np.zeros(0, np.int32)
                continue
            ids = np.asarray(corpus.tokenizer.encode(record), np.int32)
            counts["tokens"] += len(ids)
            report(1, _num_bytes(record))
            yield ids

    make_rows = PackedRows if corpus.packing == "pack" else PaddedRows
    rows = make_rows(open_documents, corpus.codec.ids, corpus.codec.length)
    try:
        with _full_disk_is_told(path):
            with _writing(partial) as write:
                for row in rows:
                    record = corpus.codec.encode(row)
                    digest.update(record)
                    write(record)
                    counts["rows"] += 1
            counts["skipped"] = policy.count
            facts = {"bytes": partial.stat().st_size, "sha256": digest.hexdigest()[:16]}
            os.replace(partial, path)
            write_json(_facts_file(path), counts | facts)
    finally:
        partial.unlink(missing_ok=True)


@contextlib.contextmanager
def _full_disk_is_told(path: pathlib.Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise SaveFailed(
            f"{path} cannot be written ({error.strerror or error}). Free space or choose another "
            "folder, then start the same command again: it goes on where it stopped."
        ) from error


@contextlib.contextmanager
def _writing(path: pathlib.Path) -> Iterator[Callable[[bytes], None]]:
    """A new ArrayRecord file, on the disk at the end."""
    path.touch()  # The writer's own error for a folder that is not writable names no reason.
    writer = array_record_module.ArrayRecordWriter(str(path), _WRITER_OPTIONS)
    try:
        yield writer.write
    except BaseException:
        with contextlib.suppress(Exception):
            writer.close()
        raise
    try:
        writer.close()
    except RuntimeError as error:
        raise OSError(str(error)) from error
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def _facts_file(path: pathlib.Path) -> pathlib.Path:
    return path.with_suffix(".json")


# ------------------------------------------------------------------------------
# All shards, by one process or several.


def write_shards(
    corpus: Corpus,
    tasks: Sequence[ShardTask],
    folder: pathlib.Path,
    num_workers: int,
    report: Report,
) -> None:
    """Writes the files of tasks.

    Args:
      corpus: what is prepared.
      tasks: files that are not finished.
      folder: of the files.
      num_workers: processes; with 1 it is this one.
      report: is told of progress, in this process.

    Raises:
      UserError: what a shard raises.
      LostWorker: if a worker process was killed.
    """
    if num_workers == 1 or len(tasks) < 2:
        for task in tasks:
            write_shard(corpus, task, folder, report)
        return
    context = multiprocessing.get_context("spawn")  # A fork would copy JAX's threads' locks.
    waiting, messages = context.Queue(), context.Queue()
    for task in tasks:
        waiting.put(task)
    workers = [
        context.Process(target=_work, args=(corpus, folder, waiting, messages), daemon=True)
        for _ in range(min(num_workers, len(tasks)))
    ]
    try:
        for worker in workers:
            worker.start()
        _follow(workers, messages, len(tasks), report)
    finally:
        for worker in workers:
            worker.terminate()
        for worker in workers:
            worker.join()
        waiting.cancel_join_thread()
        _remove_partial(folder)


class LostWorker(UserError):
    """A worker process has ended. What is finished stays, so that the same command may go on."""

    exit_code = TRY_AGAIN


def _follow(workers: Sequence[Any], messages: Any, num_tasks: int, report: Report) -> None:
    finished = 0
    while finished < num_tasks:
        codes = [worker.exitcode for worker in workers if worker.exitcode]
        if codes:
            raise LostWorker(
                f"a worker process was killed (exit code {codes[0]}; -9 often means that memory "
                "has run out). Start the same command again, with fewer --workers: it goes on "
                "where it stopped."
            )
        try:
            message = messages.get(timeout=_REPORT_S)
        except queue.Empty:
            continue
        match message:
            case (int(documents), int(num_bytes)):
                report(documents, num_bytes)
            case None:
                finished += 1
            case UserError() as error:
                raise error
            case str(trace):
                raise RuntimeError(f"a worker process failed:\n{trace}")


def _work(corpus: Corpus, folder: pathlib.Path, waiting: Any, messages: Any) -> None:
    """What a worker process does: shards, until it is ended."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; the parent ends its workers.
    end_with_parent()
    report = _Batched(lambda documents, num_bytes: messages.put((documents, num_bytes)))
    while True:
        task = waiting.get()
        try:
            write_shard(corpus, task, folder, report)
            report.flush()
            messages.put(None)
        except UserError as error:
            messages.put(error)
        except Exception:  # Whatever it is, the parent shows it and ends.
            messages.put(traceback.format_exc())


class _Batched:
    """Passes counts on a few times a second."""

    def __init__(self, report: Report):
        self._report = report
        self._documents = self._bytes = 0
        self._last = time.monotonic()

    def __call__(self, documents: int, num_bytes: int) -> None:
        self._documents += documents
        self._bytes += num_bytes
        if time.monotonic() - self._last > _REPORT_S:
            self.flush()

    def flush(self) -> None:
        """Passes on what there is."""
        self._report(self._documents, self._bytes)
        self._documents = self._bytes = 0
        self._last = time.monotonic()


# ------------------------------------------------------------------------------
# A folder from its beginning, or from where it stopped, to its end.


@contextlib.contextmanager
def hold_folder(folder: pathlib.Path) -> Iterator[None]:
    """Keeps other preparations from writing to a folder; ends with the process, however that ends.

    Raises:
      UserError: if another process holds it.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        lock_opened(
            descriptor,
            folder,
            taken=f"{folder}: another process is preparing data there; wait until it has ended, or "
            "name another folder.",
            otherwise="make sure that nothing else prepares data there",
        )
        yield
    finally:
        os.close(descriptor)


def start_folder(folder: pathlib.Path, plan: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Checks that a folder is of this plan, notes the plan in a new one, and says what is finished.

    Returns:
      What is known of each file that is finished, by its name.

    Raises:
      UserError: if the folder holds rows that were made otherwise, naming the differences.
    """
    _remove_partial(folder)
    facts: dict[str, dict[str, Any]] = {}
    if (folder / TOKENS_FILE).is_file():
        whole = read_prepared(str(folder)).facts
        _check_same(whole, plan, folder)
        for split in SPLITS:
            shards = whole[split]
            names = (shard_name(split, number, len(shards)) for number in range(len(shards)))
            facts |= dict(zip(names, shards, strict=True))
    else:
        plan_file = folder / PLAN_FILE
        if plan_file.is_file():
            _check_same(_read_json(plan_file), plan, folder)
        else:
            with _full_disk_is_told(plan_file):
                write_json(plan_file, plan)
    for path in folder.glob("*.array_record"):
        if _facts_file(path).is_file():
            facts[path.name] = _read_json(_facts_file(path))
    return {
        name: fact
        for name, fact in facts.items()
        if (folder / name).is_file() and (folder / name).stat().st_size == fact["bytes"]
    }


def _read_json(path: pathlib.Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(values, dict):
            return values
        problem = f"a {type(values).__name__}, not an object"
    except ValueError as error:
        problem = f"not JSON ({error})"
    raise UserError(
        f"{path} is damaged: {problem}. Delete it, then start the same command again: it goes on "
        "with the files that are finished."
    )


def _remove_partial(folder: pathlib.Path) -> None:
    for path in folder.glob(f".*{_PARTIAL}"):
        path.unlink(missing_ok=True)


# What of a plan an option of the command says in other words.
_OPTIONS = {"shards": "files (--shard_mb)"}


def _check_same(saved: Mapping[str, Any], plan: Mapping[str, Any], folder: pathlib.Path) -> None:
    nothing = "(not there)"
    lines = [
        f"  {_OPTIONS.get(name, name)}: then {saved.get(name, nothing)!r}, "
        f"now {plan.get(name, nothing)!r}"
        for name in sorted((saved.keys() | plan.keys()) - set(SPLITS))
        if saved.get(name, nothing) != plan.get(name, nothing)
    ]
    if lines:
        raise UserError(
            f"{folder} holds rows that were made with other options or of other texts:\n"
            + "\n".join(lines)
            + "\nName another folder as --output, or delete this one to prepare it again."
        )


def finish_folder(
    folder: pathlib.Path, plan: Mapping[str, Any], tasks: Sequence[ShardTask]
) -> dict[str, list[dict[str, Any]]]:
    """Writes tokens.json, which makes the folder whole; returns the facts of each split's shards.

    Raises:
      UserError: if the training split has no row.
    """
    finished = start_folder(folder, plan)
    shards: dict[str, list[dict[str, Any]]] = {split: [] for split in SPLITS}
    for task in tasks:
        shards[task.split].append(finished[task.name])
    skipped = sum(fact["skipped"] for facts in shards.values() for fact in facts)
    if not sum(fact["rows"] for fact in shards["train"]):
        raise UserError(
            f"none of the {plan['documents']['train']} training documents holds text ({skipped} "
            "bad records). Give a corpus with text."
        )
    if skipped:
        logging.warning("%d bad records were left out.", skipped)
    with _full_disk_is_told(folder / TOKENS_FILE):
        write_json(folder / TOKENS_FILE, {**plan, **shards})
    for task in tasks:
        _facts_file(folder / task.name).unlink(missing_ok=True)
    (folder / PLAN_FILE).unlink(missing_ok=True)
    return shards
