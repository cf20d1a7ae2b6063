"""Two processes over loopback, one device each, do what one process with two devices does."""

import json
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time

import pytest
from cheap_compilation import CHEAP_COMPILATION

from megatransformer_jax.training.recorder import read_metrics

pytestmark = pytest.mark.slow

TIMEOUT_S = 240
MESH = {"data": 1, "fsdp": 2}
# Three texts do not divide by two devices, so one more fills them up.
SAMPLES = {"every_steps": 2, "max_new_tokens": 4, "prompts": ["The ", "a", "He"], "temperature": 0}


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def start(name: str, folder: pathlib.Path, values: dict, repository, num_devices: int):
    values = {**values, "compilation_cache_dir": str(repository / ".jax_cache")}
    config = folder / f"{name}.json"
    config.write_text(json.dumps(values))
    environment = {
        "PATH": "/usr/bin:/bin",
        "HOME": str(folder),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={num_devices} {CHEAP_COMPILATION}",
    }
    with open(folder / f"{name}.log", "ab") as output:
        return subprocess.Popen(
            [sys.executable, "-m", "experiments.train", f"--config={config}"],
            cwd=repository,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
        )


def start_two(folder: pathlib.Path, values: dict, repository) -> list[subprocess.Popen]:
    port = free_port()
    return [
        start(
            f"process_{process_id}",
            folder,
            {
                **values,
                "distributed": {
                    "enabled": True,
                    "coordinator": f"127.0.0.1:{port}",
                    "num_processes": 2,
                    "process_id": process_id,
                },
            },
            repository,
            1,
        )
        for process_id in range(2)
    ]


def finish(processes: list[subprocess.Popen], folder: pathlib.Path) -> None:
    try:
        codes = [process.wait(TIMEOUT_S) for process in processes]
    finally:
        for process in processes:
            process.kill()
    logs = "\n".join(path.read_text()[-3000:] for path in sorted(folder.glob("*.log")))
    assert codes == [0] * len(processes), logs


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


def test_two_processes_agree_with_one_and_one_can_go_on(tmp_path, small_run, repository):
    two, one = tmp_path / "two", tmp_path / "one"
    # A schedule that does not depend on the number of steps, so that a run can be extended.
    changes = {
        "mesh": MESH,
        "optimizer": {"schedule": "constant", "warmup_steps": 1},
        "samples": SAMPLES,
        "diagnostics": {"every_steps": 2, "kinds": ["recurrence"]},
    }
    first, more = ({**changes, "train": {"steps": steps}} for steps in (2, 4))
    finish(start_two(tmp_path, small_run(two, first), repository), tmp_path)
    finish([start("one", tmp_path, small_run(one, more), repository, 2)], tmp_path)
    assert_same_metrics(two, one, 2)
    samples = [sample_lines(tmp_path / f"{name}.log", 2) for name in ("process_0", "one")]
    assert len(samples[0]) == 3 and samples[0] == samples[1]
    assert all((path / "diagnostics/step_000002/recurrence.png").is_file() for path in (two, one))

    # What two processes saved, one process on two devices goes on with.
    quiet = {**more, "samples": {"every_steps": 0}, "diagnostics": {"every_steps": 0}}
    finish([start("two_more", tmp_path, small_run(two, quiet), repository, 2)], tmp_path)
    assert "resuming from step 2" in (tmp_path / "two_more.log").read_text()
    assert_same_metrics(two, one, 4)
    tables = [json.loads((path / "depth_table.json").read_text()) for path in (two, one)]
    for row, other in zip(tables[0]["rows"], tables[1]["rows"], strict=True):
        assert row["loss"] == pytest.approx(other["loss"], rel=1e-5)
        assert row["tokens"] == other["tokens"]


def test_an_axis_that_spans_processes_shares_their_rows(tmp_path, small_run, repository):
    two, one = tmp_path / "two", tmp_path / "one"
    changes = {
        "mesh": {"data": 1, "tensor": 2},
        "train": {"steps": 2},
        "evaluation": {"every_steps": 1, "final_depths": [1]},
    }
    finish(start_two(tmp_path, small_run(two, changes), repository), tmp_path)
    finish([start("one", tmp_path, small_run(one, changes), repository, 2)], tmp_path)
    assert_same_metrics(two, one, 2)


def test_one_preempted_process_stops_both_after_the_same_step(tmp_path, small_run, repository):
    workdir = tmp_path / "run"
    changes = {
        "mesh": MESH,
        "train": {"steps": 100_000},
        "checkpoint": {"every_steps": 100_000},
        "evaluation": {"every_steps": 100_000},
    }
    processes = start_two(tmp_path, small_run(workdir, changes), repository)
    metrics = workdir / "metrics.jsonl"
    deadline = time.monotonic() + TIMEOUT_S
    while not (metrics.exists() and metrics.stat().st_size):
        assert time.monotonic() < deadline and all(p.poll() is None for p in processes)
        time.sleep(0.05)
    processes[1].send_signal(signal.SIGTERM)
    finish(processes, tmp_path)
    (saved,) = (int(path.name) for path in (workdir / "checkpoints").iterdir())
    assert len(read_metrics(metrics)) == saved
    assert f"stopped after step {saved} of" in (tmp_path / "process_0.log").read_text()
