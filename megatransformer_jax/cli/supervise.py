"""A process of a run of several, as the child of one that waits for it and says how it ended.

When another process of the run is lost, JAX ends this one from native code: with a stack trace,
the exit code of an abort, and no exception that Python could catch. So such a process runs as a
child. Its parent imports no JAX, passes signals and stderr on, and turns an end like that into one
line and exit code 3, at which a script that starts the run may start it again.
"""

import contextlib
import ctypes
import os
import re
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType
from typing import NoReturn

from megatransformer_jax.config.option import TRY_AGAIN, UserError

_FORWARDED = (signal.SIGTERM, signal.SIGINT)
_PR_SET_PDEATHSIG = 1
# How long the last lines of the child may take; helpers that it has left may hold its stderr.
_DRAIN_S = 1.0


class Outcome:
    """What the child tells of how its run ended.

    Attributes:
      is_stopped: the run was asked to stop, by a signal to any of its processes.
    """

    def __init__(self, descriptor: int):
        self.is_stopped = False
        self._descriptor = descriptor

    def tell(self, code: int) -> None:
        """Tells the parent the exit code."""
        os.write(self._descriptor, f"{code} {int(self.is_stopped)}".encode())


@contextlib.contextmanager
def supervised(*, shows_native_errors: bool) -> Iterator[Outcome]:
    """The block goes on in a child of this process, which itself ends as the child does.

    Exit codes of the parent are those of the child. But they are 3 if the child

    - was ended by native code or by a signal that did not come from here,
    - or has left because another process of the run was asked to stop, and not this one.

    Errors with exit code 3 end the child at once: an orderly exit would wait for other processes.

    Args:
      shows_native_errors: leaves what native code writes about lost processes in stderr.
    """
    outcome = _fork(shows_native_errors)
    try:
        yield outcome
    except UserError as error:
        outcome.tell(error.exit_code)
        if error.exit_code == TRY_AGAIN:
            print(f"error: {error}", file=sys.stderr)
            _flush()
            os._exit(TRY_AGAIN)
        raise
    except SystemExit as error:
        outcome.tell(error.code if isinstance(error.code, int) else int(error.code is not None))
        raise
    except KeyboardInterrupt:
        outcome.tell(128 + signal.SIGINT)
        raise
    except BaseException:
        outcome.tell(1)
        raise
    outcome.tell(0)


def _fork(shows_native_errors: bool) -> Outcome:
    """Returns in the child; the parent ends in here."""
    _flush()
    told, tell = os.pipe()
    lines, stderr = os.pipe()
    parent = os.getpid()
    signals = _Signals()
    child = os.fork()
    if child:
        os.close(tell)
        os.close(stderr)
        signals.forward_to(child)
        _wait(child, told, _Stderr(lines, shows_native_errors), signals)
    signals.restore()
    # Otherwise a terminal would send Ctrl-C to both, and the child would get it twice.
    os.setpgid(0, 0)
    if sys.platform == "linux":  # The child must not outlive a parent that is killed.
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(TRY_AGAIN)
    os.dup2(stderr, 2)
    for descriptor in (told, lines, stderr):
        os.close(descriptor)
    return Outcome(tell)


def _flush() -> None:
    sys.stdout.flush()
    sys.stderr.flush()


# ------------------------------------------------------------------------------
# The parent.


class _Signals:
    """Passes signals on to the child, also those that come before there is one."""

    def __init__(self) -> None:
        self.received: list[int] = []
        self._child: int | None = None
        self._previous = {number: signal.signal(number, self._on_signal) for number in _FORWARDED}

    def forward_to(self, child: int) -> None:
        """From now on."""
        self._child = child
        for number in self.received:
            os.kill(child, number)

    def restore(self) -> None:
        """Puts back what was there before."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.received.append(number)
        if self._child is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._child, number)


def _wait(child: int, told: int, stderr: "_Stderr", signals: _Signals) -> NoReturn:
    """Waits for the child, and ends this process."""
    _, status = os.waitpid(child, 0)
    stderr.finish()
    os.set_blocking(told, False)
    with contextlib.suppress(BlockingIOError):  # A helper of the child has the other end still.
        if words := os.read(told, 64).split():
            code, is_stopped = map(int, words)
            if is_stopped and code == 0 and not signals.received:
                _say(
                    "stopped, because another process of this run was asked to stop; start all "
                    "processes again to go on."
                )
                code = TRY_AGAIN
            os._exit(code)
    code = os.waitstatus_to_exitcode(status)
    if -code in signals.received:  # It was not yet listening.
        os._exit(128 - code)
    how = f"exit code {code}" if code >= 0 else signal.Signals(-code).name
    reason = stderr.lost_process or f"this process was ended by native code or from outside ({how})"
    _say(f"error: {reason}; start all processes again: the run goes on from its newest checkpoint.")
    os._exit(TRY_AGAIN)


def _say(line: str) -> None:
    with contextlib.suppress(OSError):
        os.write(2, f"{line}\n".encode())


# Lines of JAX's coordination service: how it finds out, and its last words, a stack trace behind.
_FINDING = re.compile(rb"[EW]\d{4} .* (?:coordination_service\w*|preemption_\w+)\.(?:cc|h):\d+\]")
_LAST_WORDS = re.compile(
    rb"F\d{4} .*Terminating process because the JAX distributed service detected fatal errors"
)
# A message of native code or of Python's log.
_NEW_MESSAGE = re.compile(rb"[IWEF]\d{4} |\d\d:\d\d:\d\d |Traceback |error: ")


class _Stderr:
    """Passes on what the child writes to stderr, without the news of lost processes.

    Args:
      descriptor: read from.
      is_whole: passes on everything.
    """

    def __init__(self, descriptor: int, is_whole: bool):
        self._is_whole = is_whole
        self._news: list[bytes] = []
        self._is_news = False
        self._file = os.fdopen(descriptor, "rb", buffering=0)
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def finish(self) -> None:
        """Waits for the last lines."""
        self._thread.join(_DRAIN_S)

    @property
    def lost_process(self) -> str | None:
        """Which process is lost, as far as JAX says, or None if it says nothing of the kind."""
        text = b" ".join(self._news).decode(errors="replace")
        if "JAX distributed service detected fatal errors" not in text:
            return None
        if "RegisterTask" in text:
            return "not all processes of this run came within distributed.initialization_seconds"
        if numbers := re.search(r"stopped sending heartbeats\):\s*((?:\d+,?\s+)+)", text):
            lost = ", ".join(re.findall(r"\d+", numbers[1]))
            return f"process {lost} of this run has ended or cannot be reached"
        if "Failed to send RPC to coordination service" in text:
            return "process 0 of this run has ended or cannot be reached"
        return "another process of this run has ended or cannot be reached"

    def _read(self) -> None:
        rest = b""
        while chunk := self._file.read(65536):
            *lines, rest = (rest + chunk).split(b"\n")
            for line in lines:
                self._pass_on(line + b"\n")
        self._pass_on(rest)

    def _pass_on(self, line: bytes) -> None:
        if _FINDING.match(line) or _LAST_WORDS.match(line):
            self._is_news = True
        elif _NEW_MESSAGE.match(line):
            self._is_news = False
        if self._is_news:
            self._news.append(line)
        if self._is_whole or not self._is_news:
            with contextlib.suppress(OSError):
                os.write(2, line)
