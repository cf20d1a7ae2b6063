"""Two processes over loopback, one device each: their numbers, and how they end and go on."""

import dataclasses
import json
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import pytest
from cheap_compilation import CHEAP_COMPILATION

from megatransformer_jax.training.recorder import read_metrics

pytestmark = pytest.mark.slow

TIMEOUT_S = 240
HEARTBEAT_S = 30
_DEVICES = "--xla_force_host_platform_device_count"
# Three texts do not divide by two devices, so one more fills them up.
SAMPLES = {"max_new_tokens": 4, "prompts": ["The ", "a", "He"], "temperature": 0}
SAVED = 20  # Step of the first checkpoint; far enough from the second to be killed between them.
# A schedule that does not depend on the number of steps, so that a run can be extended.
CHANGES = {
    "mesh": {"data": 1, "fsdp": 2},
    "optimizer": {"schedule": "constant", "warmup_steps": 1},
    "train": {"steps": 100_000},
    "checkpoint": {"every_steps": SAVED},
    "evaluation": {"every_steps": 100_000},
    "samples": {"every_steps": SAVED, **SAMPLES},
    "diagnostics": {"every_steps": SAVED, "kinds": ["recurrence"]},
    # TensorBoard's writer imports torch where that is installed, which takes a second.
    "logging": {"writers": []},
}


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@dataclasses.dataclass(frozen=True)
class Launcher:
    """Starts processes of runs, with their logs in a folder."""

    folder: pathlib.Path
    repository: pathlib.Path
    started: list[subprocess.Popen] = dataclasses.field(default_factory=list)

    def start(self, name: str, values: dict, num_devices: int) -> subprocess.Popen:
        values = {**values, "compilation_cache_dir": str(self.repository / ".jax_cache")}
        config = self.folder / f"{name}.json"
        config.write_text(json.dumps(values))
        environment = {
            "PATH": "/usr/bin:/bin",
            "HOME": str(self.folder),
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": " ".join([f"{_DEVICES}={num_devices}", CHEAP_COMPILATION]),
        }
        with open(self.log(name), "wb") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", "experiments.train", f"--config={config}"],
                cwd=self.repository,
                env=environment,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        self.started.append(process)
        return process

    def start_two(self, name: str, values: dict) -> list[subprocess.Popen]:
        joined = {
            "enabled": True,
            "coordinator": f"127.0.0.1:{free_port()}",
            "num_processes": 2,
            "heartbeat_seconds": HEARTBEAT_S,
        }
        started = []
        for index in range(2):
            mine = {**values, "distributed": {**joined, "process_id": index}}
            started.append(self.start(f"{name}_{index}", mine, 1))
        return started

    def finish(self, *processes: subprocess.Popen) -> list[int]:
        """Their exit codes."""
        return [process.wait(TIMEOUT_S) for process in processes]

    def log(self, name: str) -> pathlib.Path:
        return self.folder / f"{name}.log"

    def logs(self) -> str:
        return "\n".join(f"{p}\n{p.read_text()[-3000:]}" for p in sorted(self.folder.glob("*.log")))

    def wait_for(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + TIMEOUT_S
        while not condition():
            assert time.monotonic() < deadline, self.logs()
            time.sleep(0.01)


def num_lines(path: pathlib.Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


@dataclasses.dataclass(frozen=True)
class Lives:
    """A run on two processes that was killed, preempted and went on with one, and its like.

    Attributes:
      launcher: with the logs: killed_0, killed_1, preempted_0, preempted_1, last, whole.
      lived: its workdir.
      killed: the lines of its metrics when a process was killed.
      seconds: that the other process took to end.
      resumed, stopped: steps from which it went on after that, and at which it was preempted.
      whole: workdir of the same run on one process with two devices, uninterrupted.
      codes: exit codes of both processes, killed and preempted.
    """

    launcher: Launcher
    lived: pathlib.Path
    killed: list[str]
    seconds: float
    resumed: int
    stopped: int
    whole: pathlib.Path
    codes: dict[str, list[int]]


@pytest.fixture(scope="module")
def launcher(tmp_path_factory, repository) -> Iterator[Launcher]:
    launcher = Launcher(tmp_path_factory.mktemp("runs"), repository)
    yield launcher
    for process in launcher.started:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def lives(launcher: Launcher, small_run: Callable[..., dict]) -> Lives:
    lived, whole = launcher.folder / "lived", launcher.folder / "whole"
    metrics = lived / "metrics.jsonl"
    codes = {}

    processes = launcher.start_two("killed", small_run(lived, CHANGES))
    launcher.wait_for(lambda: (lived / "checkpoints" / str(SAVED)).exists())
    launcher.wait_for(lambda: num_lines(metrics) > SAVED)
    processes[1].kill()
    start = time.monotonic()
    codes["killed"] = launcher.finish(*processes)
    seconds = time.monotonic() - start
    killed = metrics.read_text().splitlines()

    processes = launcher.start_two("preempted", small_run(lived, CHANGES))
    launcher.wait_for(lambda: num_lines(metrics) > len(killed))
    processes[1].send_signal(signal.SIGTERM)
    codes["preempted"] = launcher.finish(*processes)
    resumed, stopped = (
        int(re.search(pattern, launcher.log("preempted_0").read_text())[1])
        for pattern in (r"resuming from step (\d+)", r"stopped after step (\d+)")
    )
    # What two processes saved, one process on two devices goes on with.
    rest = {**CHANGES, "train": {"steps": stopped + 2}}
    assert launcher.finish(launcher.start("last", small_run(lived, rest), 2)) == [0], (
        launcher.logs()
    )
    assert launcher.finish(launcher.start("whole", small_run(whole, rest), 2)) == [0], (
        launcher.logs()
    )
    return Lives(launcher, lived, killed, seconds, resumed, stopped, whole, codes)


def assert_same_metrics(left: pathlib.Path, right: pathlib.Path, num_steps: int) -> None:
    rows, others = (read_metrics(path / "metrics.jsonl") for path in (left, right))
    assert [row["step"] for row in rows] == list(range(1, num_steps + 1))
    for row, other in zip(rows, others[:num_steps], strict=True):
        assert row.keys() == other.keys()
        for name in row:
            assert row[name] == pytest.approx(other[name], rel=1e-5), (row["step"], name)


def sample_lines(log: pathlib.Path, step: int) -> list[str]:
    """What a run showed of its model after a step."""
    lines = re.findall(rf"sample prompt_\d after step {step}: .*", log.read_text())
    return sorted(lines)


def last_line(log: pathlib.Path) -> str:
    return log.read_text().splitlines()[-1]


def test_a_killed_process_ends_the_other_within_the_heartbeat_in_one_line(lives):
    assert lives.codes["killed"] == [3, -signal.SIGKILL], lives.launcher.logs()
    assert lives.seconds < HEARTBEAT_S
    text = lives.launcher.log("killed_0").read_text()
    assert re.search(r"\nerror: .* start all processes again: .*newest checkpoint\.\n$", text), text
    assert "Traceback" not in text and "stack trace" not in text, text


def test_the_restart_repeats_the_lost_steps_bit_for_bit(lives):
    lines = (lives.lived / "metrics.jsonl").read_text().splitlines()
    assert SAVED <= lives.resumed < len(lives.killed) < lives.stopped
    assert lines[: len(lives.killed)] == lives.killed


def test_one_preempted_process_stops_both_after_the_same_step(lives):
    """Nobody has asked process 0 to end, so it is to be started again."""
    assert lives.codes["preempted"] == [3, 0], lives.launcher.logs()
    logs = [lives.launcher.log(f"preempted_{index}") for index in range(2)]
    for log in logs:
        assert f"stopped after step {lives.stopped} of" in log.read_text()
        assert f"asked to stop: saving step {lives.stopped}" in log.read_text()
    assert "another process of this run was asked to stop" in last_line(logs[0])
    assert re.search(rf"saved step {lives.stopped} in [\d.]+ s; the steps", logs[0].read_text())


def test_two_processes_agree_with_one_and_one_goes_on(lives):
    steps = lives.stopped + 2
    assert f"resuming from step {lives.stopped}" in lives.launcher.log("last").read_text()
    assert_same_metrics(lives.lived, lives.whole, steps)
    samples = [sample_lines(lives.launcher.log(name), SAVED) for name in ("killed_0", "whole")]
    assert len(samples[0]) == 3 and samples[0] == samples[1]
    for path in (lives.lived, lives.whole):
        assert (path / f"diagnostics/step_{SAVED:06d}/recurrence.png").is_file()
    tables = [json.loads((p / "depth_table.json").read_text()) for p in (lives.lived, lives.whole)]
    for row, other in zip(tables[0]["rows"], tables[1]["rows"], strict=True):
        assert row["loss"] == pytest.approx(other["loss"], rel=1e-5)
        assert row["tokens"] == other["tokens"]


def test_an_axis_that_spans_processes_shares_their_rows(lives, launcher, small_run):
    two = launcher.folder / "spanned"
    changes = {
        **CHANGES,
        "mesh": {"data": 1, "tensor": 2},
        "train": {"steps": 2},
        "evaluation": {"every_steps": 1, "final_depths": [1]},
        "samples": {"every_steps": 0},
        "diagnostics": {"every_steps": 0},
    }
    processes = launcher.start_two("spanned", small_run(two, changes))
    assert launcher.finish(*processes) == [0, 0], launcher.logs()
    assert_same_metrics(two, lives.whole, 2)
