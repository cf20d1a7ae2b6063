"""A process of several is a child, and its parent says how it ended."""

import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from megatransformer_jax.cli import supervise

# How jaxlib 0.10.2 ends process 0 when process 1 is killed.
NEWS = r"""
E1130 14:45:23.097598    1851 coordination_service.cc:1549] [20] Use error polling to propagate: \
UNAVAILABLE: The following tasks are unhealthy (stopped sending heartbeats):
1
The tasks have crashed. Check the task logs for an earlier error.
F1130 14:45:23.098196    1862 client.h:80] Terminating process because the JAX distributed \
service detected fatal errors. This most likely indicates that another task died
*** Check failure stack trace: ***
    @     0x7f548de58634  absl::lts_20260107::log_internal::LogMessage::SendToLog()
""".lstrip().replace("\\\n", "")
PROGRAM = """
import os, signal, sys, time
from megatransformer_jax.config.option import TRY_AGAIN, UserError
from megatransformer_jax.cli.supervise import supervised
class Lost(UserError):
    exit_code = TRY_AGAIN
what, shows = sys.argv[1:3]
with supervised(shows_native_errors=shows == "all") as outcome:
    print("before", file=sys.stderr)
    match what:
        case "news":
            os.write(2, os.environ["NEWS"].encode())
            os.abort()
        case "crash":
            os.kill(os.getpid(), signal.SIGSEGV)
        case "lost":
            raise Lost("process 1 is lost")
        case "exit":
            sys.exit(5)
        case "bug":
            raise KeyError("a bug")
        case "stop":
            outcome.is_stopped = True
        case "wait":
            signal.signal(signal.SIGTERM, lambda *_: setattr(outcome, "is_stopped", True))
            print(os.getpid(), flush=True)
            while not outcome.is_stopped:
                time.sleep(0.01)
            print("stopped by a signal")
        case "deaf":
            print(os.getpid(), flush=True)
            time.sleep(60)
"""
AGAIN = "start all processes again"


def start(what: str, shows: str = "clear") -> subprocess.Popen[str]:
    root = pathlib.Path(supervise.__file__).parents[2]
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, what, shows],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(root), "NEWS": NEWS},
    )


def run(what: str, shows: str = "clear") -> tuple[int, str]:
    """Exit code and stderr."""
    process = start(what, shows)
    _, stderr = process.communicate(timeout=60)
    return process.returncode, stderr


def test_a_lost_process_is_one_line_and_exit_code_3() -> None:
    again = f"{AGAIN}: the run goes on from its newest checkpoint."
    line = f"error: process 1 of this run has ended or cannot be reached; {again}\n"
    assert run("news") == (3, f"before\n{line}")
    assert run("news", "all") == (3, f"before\n{NEWS}{line}")
    how = "this process was ended by native code or from outside (SIGSEGV)"
    assert run("crash") == (3, f"before\nerror: {how}; {again}\n")
    assert run("lost") == (3, "before\nerror: process 1 is lost\n")


def test_other_ends_stay_as_they_are() -> None:
    assert run("none") == (0, "before\n")
    assert run("exit") == (5, "before\n")
    code, stderr = run("bug")
    assert code == 1 and stderr.startswith("before\nTraceback") and "KeyError: 'a bug'" in stderr


def test_a_process_that_no_signal_has_reached_is_to_be_started_again() -> None:
    code, stderr = run("stop")
    assert (
        code == 3 and "another process of this run was asked to stop" in stderr and AGAIN in stderr
    )
    asked = start("wait")
    assert asked.stdout is not None
    asked.stdout.readline()
    asked.send_signal(signal.SIGTERM)
    out, stderr = asked.communicate(timeout=60)
    assert (asked.returncode, out, stderr) == (0, "stopped by a signal\n", "before\n")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGKILL, -9)])
def test_the_child_ends_with_its_parent(number: int, code: int) -> None:
    process = start("deaf")
    assert process.stdout is not None
    child = int(process.stdout.readline())
    process.send_signal(number)
    assert process.wait(60) == code
    deadline = time.monotonic() + 30
    while pathlib.Path(f"/proc/{child}").exists() and time.monotonic() < deadline:
        time.sleep(0.01)  # Whoever has inherited it collects it.
    state = pathlib.Path(f"/proc/{child}/stat")
    assert not state.exists() or state.read_text().split(")")[1].split()[0] == "Z"


def test_what_is_lost_is_read_from_the_news() -> None:
    def lost(*lines: bytes) -> str | None:
        reader, writer = os.pipe()
        os.write(writer, b"\n".join(lines))
        os.close(writer)
        stderr = supervise._Stderr(reader, is_whole=False)
        stderr.finish()
        return stderr.lost_process

    fatal = (
        b"F1130 14:44:56.309729 12 client.h:80] Terminating process because the JAX distributed "
        b"service detected fatal errors. absl::Status: "
    )
    rpc = b"UNAVAILABLE: Failed to send RPC to coordination service."
    assert lost(fatal + rpc) == "process 0 of this run has ended or cannot be reached"
    assert "distributed.initialization_seconds" in str(
        lost(fatal + b"DEADLINE_EXCEEDED", b"", b"RPC: /xla.coordination/RegisterTask")
    )
    assert lost(fatal + b"other") == "another process of this run has ended or cannot be reached"
    assert lost(b"12:00:00 a line of the log") is None
