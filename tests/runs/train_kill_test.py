"""kill -9 at random moments: the next start resumes, and the losses do not change by a bit."""

import itertools
import json
import os
import pathlib
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import pytest
from cheap_compilation import CHEAP_COMPILATION

# At any time; some steps or saves after it went on; in a save.
KILLS = ("any", "after", "save", "save")
STEPS = 200
EVERY_STEPS = 10
CHANGES = {
    "train": {"steps": STEPS},
    "checkpoint": {"every_steps": EVERY_STEPS, "keep_last": 2, "keep_best": 1},
    "evaluation": {"every_steps": 50},
    # TensorBoard's writer imports torch where that is installed, which takes a second.
    "logging": {"every_steps": 3, "writers": []},
}
TIMEOUT_S = 240
RESUMED = re.compile(r"resuming from step (\d+)")


def write_config(path: pathlib.Path, values: dict, repository: pathlib.Path) -> pathlib.Path:
    values["compilation_cache_dir"] = str(repository / ".jax_cache")
    path.write_text(json.dumps(values))
    return path


@pytest.fixture
def start(repository: pathlib.Path) -> Iterator[Callable[..., subprocess.Popen]]:
    """Starts runs; those that a failing test has left are killed."""
    started: list[subprocess.Popen] = []

    def start_one(config: pathlib.Path, log: pathlib.Path) -> subprocess.Popen:
        environment = {
            "PATH": "/usr/bin:/bin",
            "HOME": str(log.parent),
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": CHEAP_COMPILATION,
        }
        with open(log, "ab") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", "experiments.train", f"--config={config}"],
                cwd=repository,
                env=environment,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        started.append(process)
        return process

    yield start_one
    for process in started:
        if process.poll() is None:
            process.kill()
            process.wait()


def reports(log: pathlib.Path) -> list[int]:
    """The steps that the process of this log has reported."""
    return [int(number) for number in re.findall(r"step (\d+)/", log.read_text())]


def latest_checkpoint(workdir: pathlib.Path) -> int:
    """Step of the newest complete checkpoint, or 0."""
    names = [path.name for path in workdir.glob("checkpoints/*")]
    return max((int(name) for name in names if name.isdigit()), default=0)


def is_saving_after(workdir: pathlib.Path, step: int) -> bool:
    """Whether there is a half-written checkpoint of a step later than `step`."""
    paths = workdir.glob("checkpoints/*.orbax-checkpoint-tmp*")
    return any(int(path.name.split(".")[0]) > step for path in paths)


def wait_for(condition: Callable[[], bool], process: subprocess.Popen) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while process.poll() is None and not condition():
        assert time.monotonic() < deadline, "the run hangs"
        time.sleep(0.002)


@pytest.mark.slow
def test_killed_at_random_moments_and_resumed_equals_uninterrupted(
    tmp_path, small_run, repository, start
):
    whole = tmp_path / "whole"
    config = write_config(tmp_path / "whole.json", small_run(whole, CHANGES), repository)
    process = start(config, tmp_path / "whole.log")
    assert process.wait(TIMEOUT_S) == 0, (tmp_path / "whole.log").read_text()

    workdir = tmp_path / "killed"
    config = write_config(tmp_path / "killed.json", small_run(workdir, CHANGES), repository)
    rng = random.Random(0)
    logs, kills_while_saving = [], 0
    for number, kind in enumerate(KILLS):
        logs.append(tmp_path / f"killed_{number}.log")
        process = start(config, logs[-1])
        kills_while_saving += kill_at_random_moment(process, kind, workdir, logs[-1], rng)

    logs.append(tmp_path / "last.log")
    process = start(config, logs[-1])
    assert process.wait(TIMEOUT_S) == 0, logs[-1].read_text()
    left = {path.name for path in (workdir / "checkpoints").iterdir()}
    assert all(name.isdigit() for name in left) and str(STEPS) in left, left
    expected = (whole / "metrics.jsonl").read_text().splitlines()
    found = (workdir / "metrics.jsonl").read_text().splitlines()
    assert len(expected) == STEPS
    for step, (one, other) in enumerate(itertools.zip_longest(expected, found), start=1):
        assert one == other, f"step {step}"
    assert (workdir / "depth_table.json").read_text() == (whole / "depth_table.json").read_text()

    # The kills were what they claim to be, and each start went on from the one before.
    assert kills_while_saving >= 2
    resumed = [int(n) for log in logs for n in RESUMED.findall(log.read_text())]
    assert resumed == sorted(resumed)
    assert len(set(resumed)) >= len(KILLS) // 2, resumed


def kill_at_random_moment(
    process: subprocess.Popen,
    kind: str,
    workdir: pathlib.Path,
    log: pathlib.Path,
    rng: random.Random,
) -> bool:
    """Kills a run; returns whether that was in the middle of a save that it had begun itself."""
    before = latest_checkpoint(workdir)
    # Saves that must be complete first, or no run would ever get further than the one before.
    target = before + EVERY_STEPS * rng.randint(1, 2)
    match kind:
        case "any":  # It imports, compiles, restores or trains.
            time.sleep(rng.uniform(0.2, 5.0))
        case "after":
            wait_for(lambda: latest_checkpoint(workdir) >= target, process)
            time.sleep(rng.uniform(0, 0.1))
        case "save":
            wait_for(lambda: latest_checkpoint(workdir) >= target, process)
            wait_for(lambda: is_saving_after(workdir, target), process)
            time.sleep(rng.uniform(0, 0.05))
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, f"ended before kill: {log.read_text()}"
    # It may just have completed the save that it was to be killed in.
    return kind == "save" and is_saving_after(workdir, target)


@pytest.mark.slow
def test_sigterm_saves_and_the_same_command_goes_on(tmp_path, small_run, repository, start):
    workdir, logs = tmp_path / "run", (tmp_path / "first.log", tmp_path / "second.log")
    # Far more steps than it gets to, however late the signal comes.
    changes = {**CHANGES, "checkpoint": {"every_steps": 100_000}, "train": {"steps": 100_000}}
    config = write_config(tmp_path / "run.json", small_run(workdir, changes), repository)
    saved = []
    for log in logs:
        process = start(config, log)
        wait_for(lambda log=log: len(reports(log)) >= 1, process)
        process.send_signal(signal.SIGTERM)
        assert process.wait(TIMEOUT_S) == 0
        text = log.read_text()
        assert "SIGTERM: finishing this step" in text
        assert "everything is saved. The same command resumes." in text
        saved.append(max(int(path.name) for path in (workdir / "checkpoints").iterdir()))
    assert 0 < saved[0] < saved[1] < 100_000
    assert f"resuming from step {saved[0]}" in logs[1].read_text()
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, saved[1] + 1))
