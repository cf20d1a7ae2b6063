"""kill -9 at random moments: the next start resumes, and the losses do not change by a bit."""

import itertools
import json
import pathlib
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable

import pytest

NUM_KILLS = 20
STEPS = 1500
CHANGES = {
    "train": {"steps": STEPS},
    "checkpoint": {"every_steps": 15, "keep_last": 2, "keep_best": 1},
    "evaluation": {"every_steps": 120},
    "logging": {"every_steps": 7},
}
TIMEOUT_S = 240


def write_config(path: pathlib.Path, values: dict, repository: pathlib.Path) -> pathlib.Path:
    values["compilation_cache_dir"] = str(repository / ".jax_cache")
    path.write_text(json.dumps(values))
    return path


def start(config: pathlib.Path, repository: pathlib.Path, log: pathlib.Path) -> subprocess.Popen:
    environment = {"PATH": "/usr/bin:/bin", "JAX_PLATFORMS": "cpu", "HOME": str(log.parent)}
    with open(log, "ab") as output:
        return subprocess.Popen(
            [sys.executable, "-m", "experiments.train", f"--config={config}"],
            cwd=repository,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
        )


def saving(workdir: pathlib.Path) -> Callable[[], bool]:
    """Whether a save is going on just now."""
    return lambda: any(workdir.glob("checkpoints/*.orbax-checkpoint-tmp*"))


def training(workdir: pathlib.Path, last_line_count: int) -> Callable[[], bool]:
    """Whether the process has trained further than the one before it."""
    path = workdir / "metrics.jsonl"
    return lambda: path.exists() and path.read_bytes().count(b"\n") > last_line_count


def wait_for(condition: Callable[[], bool], process: subprocess.Popen) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while process.poll() is None and not condition():
        assert time.monotonic() < deadline, "the run hangs"
        time.sleep(0.002)


@pytest.mark.slow
def test_killed_at_random_moments_and_resumed_equals_uninterrupted(tmp_path, small_run, repository):
    whole = tmp_path / "whole"
    config = write_config(tmp_path / "whole.json", small_run(whole, CHANGES), repository)
    process = start(config, repository, tmp_path / "whole.log")
    assert process.wait(TIMEOUT_S) == 0, (tmp_path / "whole.log").read_text()

    workdir = tmp_path / "killed"
    config = write_config(tmp_path / "killed.json", small_run(workdir, CHANGES), repository)
    log = tmp_path / "killed.log"
    rng = random.Random(0)
    kills_while_saving = 0
    for kill in range(NUM_KILLS):
        process = start(config, repository, log)
        if kill % 5 == 4:
            time.sleep(rng.uniform(0.2, 4.0))  # While it imports, compiles or restores.
        else:
            wait_for(training(workdir, 0), process)
            wait_for(saving(workdir), process)
            # Half of these are killed in that save, the others a little later.
            time.sleep(rng.choice([rng.uniform(0, 0.02), rng.uniform(0, 0.5)]))
        kills_while_saving += saving(workdir)()
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, f"ended before kill {kill}: {log.read_text()}"
    assert kills_while_saving >= 3

    process = start(config, repository, log)
    assert process.wait(TIMEOUT_S) == 0, log.read_text()
    left = {path.name for path in (workdir / "checkpoints").iterdir()}
    assert all(name.isdigit() for name in left) and str(STEPS) in left, left
    expected = (whole / "metrics.jsonl").read_text().splitlines()
    found = (workdir / "metrics.jsonl").read_text().splitlines()
    assert len(expected) == STEPS
    for step, (one, other) in enumerate(itertools.zip_longest(expected, found), start=1):
        assert one == other, f"step {step}"
    assert (workdir / "depth_table.json").read_text() == (whole / "depth_table.json").read_text()
    # It was indeed resumed and not started afresh.
    assert log.read_text().count("resuming from step") >= NUM_KILLS // 2


@pytest.mark.slow
def test_sigterm_saves_and_the_same_command_goes_on(tmp_path, small_run, repository):
    workdir = tmp_path / "run"
    changes = {**CHANGES, "checkpoint": {"every_steps": 100_000}, "train": {"steps": 600}}
    config = write_config(tmp_path / "run.json", small_run(workdir, changes), repository)
    process = start(config, repository, tmp_path / "run.log")
    wait_for(training(workdir, 0), process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(TIMEOUT_S) == 0
    text = (tmp_path / "run.log").read_text()
    assert "SIGTERM: finishing this step" in text
    assert "everything is saved. The same command resumes." in text
    (saved,) = (int(path.name) for path in (workdir / "checkpoints").iterdir())
    assert 0 < saved < 600
    process = start(config, repository, tmp_path / "run.log")
    assert process.wait(TIMEOUT_S) == 0
    assert f"resuming from step {saved}" in (tmp_path / "run.log").read_text()
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, 601))
