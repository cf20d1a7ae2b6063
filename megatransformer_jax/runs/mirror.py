"""Copies what a run writes on its machine into a bucket, in the background.

Objects cannot be appended to. So a run whose workdir is in a bucket writes its log, metrics,
tables, figures and events into a folder of its machine, and this copies them: metrics in parts,
each of which holds the lines of some steps, other files whole when they have changed. Checkpoints
and the tokenizer do not come this way; they are written to the bucket themselves.
"""

import contextlib
import json
import pathlib
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import NamedTuple

from absl import logging

from megatransformer_jax.config.option import TRY_AGAIN, UserError
from megatransformer_jax.runs.workdir import LOCKED_FILE
from megatransformer_jax.storage import AnyPath, files_below, first_line, write_atomically
from megatransformer_jax.training.recorder import METRIC_PARTS, METRICS_FILE, metric_parts

# A part of the metrics is written again with each report until it has this many bytes.
PART_BYTES = 256 << 10
# Between two rounds of copies, so that a run that reports often does not send its log as often.
INTERVAL_S = 30.0
# Failures in a row that end the run; the first ones are warnings.
MAX_FAILURES = 3
# Before the same is tried again where the run waits for it.
_PAUSE_S = 1.0

# Files that a run goes on with on another machine.
_CONTINUED = (LOCKED_FILE, "wandb_run_id.txt")
# In a workdir on this machine: what is not copied. Metrics are, in parts.
_LEFT_OUT = ("checkpoints", "wandb", METRICS_FILE, METRIC_PARTS)


class MirrorFailed(UserError):
    """Files could not be copied to the bucket. The message says why and what to do."""

    exit_code = TRY_AGAIN


class _Part(NamedTuple):
    """Bytes `start` to `end` of the metrics file, as an object."""

    path: AnyPath
    start: int
    end: int


class Mirror:
    """Keeps the copy of a run's files; used as a context manager by the process that writes.

    Args:
      files: folder of this machine that the run writes into.
      bucket: folder of the bucket.
      is_workdir: the run's workdir is the folder of the bucket, so what it needs to go on is
        fetched from there. Otherwise `files` is, and the copy is made afresh.
      may_write: asked before every round of copies; if not, nothing is copied: another run has
        taken the bucket's folder over.
    """

    def __init__(
        self,
        files: pathlib.Path,
        bucket: AnyPath,
        *,
        is_workdir: bool,
        may_write: Callable[[], bool] = lambda: True,
    ):
        self._files = files
        self._bucket = bucket
        self._is_workdir = is_workdir
        self._may_write = may_write
        self._parts: list[_Part] = []
        # The metrics as they were in the bucket, until `start`.
        self._fetched = b""
        # By name, size and time of what was sent of a file.
        self._sent: dict[str, tuple[int, int]] = {}
        # One sends at a time: the thread, or the run where it waits.
        self._sending = threading.Lock()
        self._failures = 0
        self._failure: MirrorFailed | None = None
        self._wanted, self._closing = threading.Event(), threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> "Mirror":
        if self._is_workdir:
            self._fetch()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Copies everything, unless the run did not get as far as `start`.

        Raises:
          MirrorFailed: if that fails, and nothing else has ended the run.
        """
        if self._thread is None:
            return
        self._closing.set()
        self._wanted.set()
        self._thread.join()
        self._thread = None
        # A bucket that has just failed several times in a row is asked once more.
        self._failures = MAX_FAILURES - 1 if isinstance(error, MirrorFailed) else 0
        self._failure = None
        try:
            self._insist(self._send_all)
        except MirrorFailed as failure:
            if error is None:
                raise
            logging.warning("%s", failure)

    def start(self) -> None:
        """Copies what there is, and goes on in the background.

        To be called when the run is sure to go on: it drops lines of metrics from the bucket that
        the metrics file has dropped, those of steps that are run again.

        Raises:
          MirrorFailed: if nothing can be copied.
        """
        if not self._is_workdir:
            for path in metric_parts(self._bucket):
                path.unlink()
        self._drop_parts()
        logging.info("files in %s are copied to %s", self._files, self._bucket)
        self._insist(self._send_all)
        self._thread = threading.Thread(target=self._work, name="mirror", daemon=True)
        self._thread.start()

    def request(self) -> None:
        """Asks for a round of copies; does not wait for it.

        Raises:
          MirrorFailed: if several rounds in a row have failed.
        """
        if self._failure is not None:
            raise self._failure
        self._wanted.set()

    def send_records(self) -> None:
        """Copies metrics and log and waits for it, so that no checkpoint lacks its steps' lines.

        Raises:
          MirrorFailed: if it fails several times in a row.
        """
        self._insist(self._send_records)

    # Rounds.

    def _work(self) -> None:
        while not self._closing.is_set():
            self._wanted.wait()
            self._wanted.clear()
            if self._closing.is_set():
                return
            if not self._succeeds(self._send_all):
                self._wanted.set()
            self._closing.wait(INTERVAL_S)

    def _insist(self, send: Callable[[], None]) -> None:
        while not self._succeeds(send):
            if self._failure is not None:
                raise self._failure
            time.sleep(_PAUSE_S)

    def _succeeds(self, send: Callable[[], None]) -> bool:
        """Whether it did; a failure is logged, and counted among those in a row."""
        if not self._may_write():
            return True
        try:
            with self._sending:
                send()
        except Exception as error:  # Of the client: of HTTP, of credentials, of the disk.
            reason = first_line(error)
            self._failures += 1
            if self._failures >= MAX_FAILURES:
                self._failure = MirrorFailed(
                    f"the run's files could not be copied to {self._bucket} {self._failures} times "
                    f"in a row ({reason}). Fix the connection or the credentials, then run the "
                    "same command again: it goes on from the newest checkpoint."
                )
            else:
                logging.warning(
                    "the run's files could not be copied to %s (%s); trying again.",
                    self._bucket,
                    reason,
                )
            return False
        self._failures, self._failure = 0, None
        return True

    # What is sent.

    def _send_records(self) -> None:
        self._send_metrics()
        if (self._files / LOCKED_FILE).exists():
            self._send_file(LOCKED_FILE)

    def _send_all(self) -> None:
        self._send_metrics()
        for name in files_below(self._files):
            parts = pathlib.PurePath(name).parts
            if parts[0] in _LEFT_OUT or any(part.startswith(".") for part in parts):
                continue
            # A file that is only there while it is written may be gone.
            with contextlib.suppress(FileNotFoundError):
                self._send_file(name)

    def _send_file(self, name: str) -> None:
        status = (self._files / name).stat()
        stamp = (status.st_size, status.st_mtime_ns)
        if self._sent.get(name) != stamp:
            write_atomically(self._bucket / name, (self._files / name).read_bytes())
            self._sent[name] = stamp

    def _send_metrics(self) -> None:
        path = self._files / METRICS_FILE
        if not path.is_file():
            return
        content = path.read_bytes()
        content = content[: content.rfind(b"\n") + 1]  # A line that is being written waits.
        if self._sent_bytes == len(content):
            return
        last = self._parts[-1] if self._parts else None
        is_open = last is not None and last.end - last.start < PART_BYTES
        start = last.start if last is not None and is_open else self._sent_bytes
        for piece in _pieces(content[start:]):
            step = json.loads(piece.partition(b"\n")[0])["step"]
            part = _Part(
                self._bucket / METRIC_PARTS / f"{step:09d}.jsonl", start, start + len(piece)
            )
            write_atomically(part.path, piece)
            if is_open:
                self._parts.pop()
                is_open = False
            self._parts.append(part)
            start = part.end

    @property
    def _sent_bytes(self) -> int:
        """How much of the metrics file the parts hold."""
        return self._parts[-1].end if self._parts else 0

    def _drop_parts(self) -> None:
        """Drops from the bucket what the metrics file does not have as it was fetched.

        It lacks the end, steps that are run again, and perhaps lines that could not be read.
        """
        path = self._files / METRICS_FILE
        content = path.read_bytes() if path.is_file() else b""
        kept = 0
        for part in self._parts:
            if content[part.start : part.end] != self._fetched[part.start : part.end]:
                break
            kept += 1
        dropped, self._parts = self._parts[kept:], self._parts[:kept]
        self._fetched = b""
        # The last ones first, and the first one not before the lines that it keeps are sent.
        for part in reversed(dropped[1:]):
            part.path.unlink(missing_ok=True)
        self._insist(self._send_metrics)
        if dropped and dropped[0].path not in {part.path for part in self._parts}:
            dropped[0].path.unlink(missing_ok=True)

    def _fetch(self) -> None:
        """Brings what the run goes on with to this machine."""
        for name in _CONTINUED:
            if (self._bucket / name).exists():
                (self._files / name).write_bytes((self._bucket / name).read_bytes())
        for path in metric_parts(self._bucket):
            start = len(self._fetched)
            self._fetched += path.read_bytes()
            self._parts.append(_Part(path, start, len(self._fetched)))
        if self._parts:
            (self._files / METRICS_FILE).write_bytes(self._fetched)


def _pieces(content: bytes) -> list[bytes]:
    """Whole lines together, `PART_BYTES` or a line more in each piece but the last."""
    pieces = []
    while content:
        end = content.find(b"\n", PART_BYTES - 1) + 1 or len(content)
        pieces.append(content[:end])
        content = content[end:]
    return pieces
