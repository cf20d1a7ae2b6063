"""Prepares the data of a run once: tokenizer, rows, tokens.json, with progress on the way."""

import contextlib
import dataclasses
import os
import pathlib
import re
import time
from collections.abc import Callable, Iterator

from absl import logging
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from megatransformer_jax.config.data import TEXT_CHANGES, DataConfig
from megatransformer_jax.config.option import ConfigError, require_defaults
from megatransformer_jax.config.run import RunConfig
from megatransformer_jax.data.fingerprint import split_fingerprint, training_text_identity
from megatransformer_jax.data.prepare import (
    Corpus,
    Report,
    finish_folder,
    hold_folder,
    start_folder,
    write_shards,
)
from megatransformer_jax.data.sources.build import build_splits
from megatransformer_jax.data.token_rows import RowCodec
from megatransformer_jax.data.tokenizer import Tokenizer
from megatransformer_jax.runs.tokenizers import keep_tokenizer, start_tokenizer
from megatransformer_jax.runs.workdir import make_folder
from megatransformer_jax.training.progress import format_duration

# What a folder of prepared rows may hold, whole or not.
_OWN_FILES = re.compile(
    r"plan\.json|tokens\.json|tokenizer(\.model|\.json)?|(rows|validation)-.*|\..*"
)
# Between lines of the log, where there is no bar.
_LINE_S = 10.0
_MEGABYTE = 1_000_000


@dataclasses.dataclass(frozen=True)
class Prepared:
    """What a folder holds, and what this call did for it.

    Attributes:
      folder: of the rows.
      rows: of both splits.
      tokens: of their documents, without start and end tokens.
      num_bytes: of text that this call tokenised.
      duration_s: of that.
    """

    folder: pathlib.Path
    rows: int
    tokens: int
    num_bytes: int
    duration_s: float


def prepare(
    config: RunConfig, output: str, *, num_workers: int | None = None, shard_mb: int = 32
) -> Prepared:
    """Tokenises and packs both splits of a run's data into a folder that `source='tokens'` reads.

    Finished files stay: a call that was killed goes on where it stopped, and a folder that is whole
    is left as it is, but for files that are missing.

    Args:
      config: of the run: its data, its tokenizer, the size of its vocabulary.
      output: folder, made if absent.
      num_workers: processes; the files do not depend on it. None: one per CPU, but at
        most one per file of the training split.
      shard_mb: megabytes of text in each file, about.

    Raises:
      UserError: if the data cannot be prepared or read, or the folder holds something else.
    """
    check_preparable(config.data)
    folder = _open_output(output)
    with hold_folder(folder):
        tokenizer = start_tokenizer(config, folder)
        keep_tokenizer(tokenizer, folder)
        corpus = _corpus(config.data, tokenizer)
        plan = corpus.plan(shard_mb * _MEGABYTE)
        tasks = corpus.tasks(plan)
        finished = start_folder(folder, plan)
        missing = [task for task in tasks if task.name not in finished]
        if len(missing) < len(tasks):
            logging.info("%d of %d files are finished.", len(tasks) - len(missing), len(tasks))
        speed = _Speed(sum(task.stop - task.start for task in missing))
        # A process takes longer to start than a small file.
        files = sum(task.split == "train" for task in missing)
        workers = num_workers or min(os.cpu_count() or 1, max(files, 1))
        if missing:
            with _shown(speed) as report:
                write_shards(corpus, missing, folder, workers, report)
        shards = finish_folder(folder, plan, tasks)
    facts = [fact for split in shards.values() for fact in split]
    return Prepared(
        folder=folder,
        rows=sum(fact["rows"] for fact in facts),
        tokens=sum(fact["tokens"] for fact in facts),
        num_bytes=speed.num_bytes,
        duration_s=speed.duration_s,
    )


def check_preparable(data: DataConfig) -> None:
    """Checks, before anything is read, that the data is text whose rows stay as they are.

    Raises:
      ConfigError: naming the option.
    """
    if data.task != "text" or data.source == "tokens":
        what = "is prepared already" if data.source == "tokens" else "is not text"
        raise ConfigError(
            "data.source",
            f"{data.source!r} {what}; choose a source of text, such as 'jsonl' or 'parquet'.",
        )
    if data.packing == "bucket":
        raise ConfigError(
            "data.packing",
            "'bucket' makes batches whose rows differ in length, which cannot be prepared; use "
            "'pack' or 'pad'.",
        )
    try:
        require_defaults(
            data.augmentation,
            TEXT_CHANGES,
            "because texts are tokenised once and not again in each epoch",
            "train on the texts themselves",
        )
    except ConfigError as error:
        raise error.below("data.augmentation") from None


def _open_output(output: str) -> pathlib.Path:
    folder = make_folder("output", output)
    others = [path.name for path in folder.iterdir() if not _OWN_FILES.fullmatch(path.name)]
    if others:
        raise ConfigError(
            "output",
            f"{folder} holds something else than prepared rows ({min(others)!r}, for example); "
            "name another folder.",
        )
    return folder


def _corpus(data: DataConfig, tokenizer: Tokenizer) -> Corpus:
    origin = training_text_identity(data)
    if data.validation_files or data.tfds_validation_split is not None:
        origin["validation data"] = split_fingerprint(data, "validation")
    return Corpus(
        sources=build_splits(data),
        tokenizer=tokenizer,
        codec=RowCodec.of(data, tokenizer),
        packing=data.packing,
        on_bad_record=data.on_bad_record,
        origin=origin,
        tokenizer_kind=data.tokenizer.kind,
    )


# ------------------------------------------------------------------------------
# How far it is: a live bar on a terminal, otherwise a line now and then.


class _Speed:
    """Documents and bytes that were tokenised, the speed, and the time that is left."""

    def __init__(self, total: int, now: Callable[[], float] = time.monotonic):
        self._now = now
        self._start = now()
        self._end = self._start
        self.total = total
        self.documents = self.num_bytes = 0

    def add(self, documents: int, num_bytes: int) -> None:
        """Counts what was done."""
        self.documents += documents
        self.num_bytes += num_bytes
        self._end = self._now()

    @property
    def duration_s(self) -> float:
        """Until the last document."""
        return self._end - self._start

    def __str__(self) -> str:
        per_s = self.num_bytes / max(self.duration_s, 1e-9)
        left = self.duration_s * (self.total - self.documents) / max(self.documents, 1)
        return (
            f"{self.documents:,} of {self.total:,} documents  {self.num_bytes / _MEGABYTE:,.0f} MB"
            f"  {per_s / _MEGABYTE:.1f} MB/s  eta {format_duration(left)}"
        )


@contextlib.contextmanager
def _shown(speed: _Speed) -> Iterator[Report]:
    """What is to be told of progress."""
    console = Console(stderr=True)
    if not (console.is_terminal or console.is_jupyter):
        yield _Lines(speed)
        return
    columns = (TextColumn("preparing"), BarColumn(), TextColumn("{task.fields[speed]}"))
    with Progress(*columns, console=console, transient=True) as progress:
        bar = progress.add_task("", total=speed.total, speed="starting ...")

        def report(documents: int, num_bytes: int) -> None:
            speed.add(documents, num_bytes)
            progress.update(bar, completed=speed.documents, speed=str(speed))

        yield report


class _Lines:
    """Logs a line every few seconds."""

    def __init__(self, speed: _Speed):
        self._speed = speed
        self._last = time.monotonic()

    def __call__(self, documents: int, num_bytes: int) -> None:
        self._speed.add(documents, num_bytes)
        if time.monotonic() - self._last > _LINE_S:
            self._last = time.monotonic()
            logging.info("%s", self._speed)
