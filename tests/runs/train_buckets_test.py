"""A whole run whose workdir is in a bucket (an emulated one): it is what a run in a folder is.

The bucket's run is killed in the middle of a save and goes on on another machine, where nothing of
it is: its metrics, parameters and tables are those of a run in a folder that nothing stops.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time

import jax
import pytest

import megatransformer_jax as mt
from megatransformer_jax.cli.commands import main
from megatransformer_jax.config.build import build
from megatransformer_jax.runs.lease import LostLease, WorkdirTaken, lease_of
from megatransformer_jax.runs.load import load_model
from megatransformer_jax.runs.train import Run, train
from megatransformer_jax.runs.workdir import shown_logs
from megatransformer_jax.storage import as_path, files_below

STEPS = 12
CHANGES = {
    "data": {"tokenizer": {"kind": "sentencepiece", "max_training_bytes": 50_000}},
    "model": {"vocab_size": 352},
    "train": {"steps": STEPS},
    "checkpoint": {"every_steps": 3, "keep_last": 2, "keep_best": 0},
    "logging": {"every_steps": 2},
}
TIMEOUT_S = 240


@pytest.fixture(scope="module")
def folder_run(tmp_path_factory, small_run):
    """The run in a folder that nothing stops."""
    workdir = tmp_path_factory.mktemp("folder") / "run"
    train(build(small_run(workdir, CHANGES)))
    return workdir


@pytest.fixture(scope="module")
def killed(gs_bucket, folder_run, small_run, repository, tmp_path_factory):
    """The run in the bucket, killed in its second save; returns its url and its output."""
    folder = tmp_path_factory.mktemp("killed")
    url = f"{gs_bucket.url}/runs/killed"
    config = folder / "config.json"
    config.write_text(json.dumps(small_run(url, CHANGES)))
    environment = {
        "PATH": "/usr/bin:/bin",
        "HOME": str(folder),
        "JAX_PLATFORMS": "cpu",
        # As many devices as this process has: programs of another mesh round otherwise.
        "XLA_FLAGS": os.environ["XLA_FLAGS"],
        "JAX_COMPILATION_CACHE_DIR": os.environ["JAX_COMPILATION_CACHE_DIR"],
        **gs_bucket.environment,
    }
    with open(folder / "output", "wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "experiments.train", f"--config={config}"],
            cwd=repository,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    deadline = time.monotonic() + TIMEOUT_S
    # Step 6 has begun to arrive, and 3 is whole: the last object of a checkpoint says so.
    while not any("checkpoints%2F6%2F" in line for line in gs_bucket.requests()):
        assert process.poll() is None, (folder / "output").read_text()
        assert time.monotonic() < deadline, "the run hangs"
        time.sleep(0.001)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not list(folder.glob("gs:*"))
    return url, (folder / "output").read_text()


def test_killed_in_a_save_and_resumed_on_another_machine_equals_a_run_in_a_folder(
    killed, folder_run, small_run, gs_bucket, tmp_path, monkeypatch
):
    url, _ = killed
    before = files_below(as_path("a", url))
    assert "checkpoints/3/commit_success.txt" in before
    assert "checkpoints/6/commit_success.txt" not in before
    assert "config.json" in before and "tokenizer.model" in before and "train.log" in before

    monkeypatch.chdir(tmp_path)
    with shown_logs("info"), contextlib.ExitStack() as stack:
        run = Run(build(small_run(url, CHANGES)), stack)
        assert run.step == 3
        run.finish()
    assert list(tmp_path.iterdir()) == []  # Nothing is left here, and no folder gs:.

    # Metrics to the bit, line for line, and all that a run in a folder has.
    found = files_below(as_path("a", url))
    lines = b"".join(
        as_path("a", f"{url}/{name}").read_bytes() for name in found if name.startswith("metrics/")
    )
    assert lines == (folder_run / "metrics.jsonl").read_bytes()
    for name in ("depth_table.json", "tokenizer.model", "tokenizer.json"):
        assert as_path("a", f"{url}/{name}").read_bytes() == (folder_run / name).read_bytes()
    tops = {name.partition("/")[0] for name in found}
    assert tops == {path.name for path in folder_run.iterdir()} - {"metrics.jsonl"} | {"metrics"}
    log = as_path("a", f"{url}/train.log").read_text()
    for line in ("step 4/12", "resuming from step 3 of gs://", "step 12/12"):
        assert line in log
    steps = {name.split("/")[1] for name in found if name.startswith("checkpoints/")}
    assert steps == {"9", "12"}  # keep_last, and nothing of what the kill has left.


def requests(bucket) -> list[str]:
    """Without those that renew the lock, which may come at any time."""
    return [line for line in bucket.requests() if "LOCK" not in line]


def test_no_request_leaves_between_reports_and_saves(gs_bucket, small_run, folder_run):
    saving = {"every_steps": 100, "keep_best": 0}
    changes = CHANGES | {"logging": {"every_steps": 100}, "checkpoint": saving}
    config = build(small_run(f"{gs_bucket.url}/runs/counted", changes))
    with mt.Trainer(config) as trainer:
        trainer.step()
        before = requests(gs_bucket)
        assert len(gs_bucket.requests()) > len(before)
        for _ in range(5):
            trainer.step()
        assert requests(gs_bucket) == before
        trainer.save()
        saved = requests(gs_bucket)[len(before) :]
    # 137 with this version of Orbax; many more would be folders that are listed again and again.
    assert 0 < len(saved) < 200


def test_a_folder_is_copied_to_a_bucket_without_its_checkpoints(
    s3_bucket, small_run, folder_run, tmp_path
):
    url = f"{s3_bucket.url}/runs/copy"
    config = build(small_run(tmp_path / "run", CHANGES | {"logging": {"mirror": url}}))
    with mt.Trainer(config) as trainer:
        for _ in range(3):
            trainer.step()
    found = files_below(as_path("a", url))
    assert {"config.json", "tokenizer.model", "train.log"} < set(found)
    assert not any(name.startswith("checkpoints") for name in found)
    assert (tmp_path / "run" / "checkpoints" / "3").is_dir()
    assert mt.read_metrics(url) == mt.read_metrics(folder_run)[:3]


def test_a_run_whose_lock_is_stolen_saves_and_copies_nothing_more(
    s3_bucket, small_run, folder_run, tmp_path
):
    url = f"{s3_bucket.url}/runs/stolen"
    config = build(small_run(tmp_path / "run", CHANGES | {"logging": {"mirror": url}}))
    with pytest.raises(LostLease, match="taken this workdir"), mt.Trainer(config) as trainer:
        trainer.step()
        trainer.save()
        with pytest.raises(WorkdirTaken), lease_of(as_path("a", url)):
            pass
        with lease_of(as_path("a", url), "another", steals=True):
            trainer.step()
            trainer.save()
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["1"]
    assert mt.read_metrics(url) == mt.read_metrics(folder_run)[:1]
    assert not json.loads((tmp_path / "run" / "config.json").read_text())["steal_lock"]
    assert "LOCK" not in files_below(as_path("a", url))


@pytest.fixture(scope="module")
def finished(killed, folder_run, small_run):
    """The finished run in the bucket."""
    url, _ = killed
    train(build(small_run(url, CHANGES)))  # Nothing, if the test above has run.
    return url


def test_a_model_in_a_bucket_is_the_one_of_the_folder(finished, folder_run):
    one, other = load_model(finished), load_model(folder_run)
    assert one.description == f"run {finished}, step 12 (latest)"
    jax.tree.map(lambda a, b: (a == b).all() or pytest.fail("differs"), one.params, other.params)
    assert one.tokenizer.digest() == other.tokenizer.digest()
    rows = mt.read_metrics(finished)
    assert rows == mt.read_metrics(folder_run)


def test_commands_read_and_write_runs_in_buckets(finished, gs_bucket, capsys, tmp_path):
    main("generate", [f"--model={finished}", "--prompt=The ", "--max_new_tokens=2"])
    main("evaluate", [f"--model={finished}", "--depths=1", "--num_batches=1"])
    main("compare", [finished, f"--output={tmp_path}/depth.png"])
    average = f"{gs_bucket.url}/runs/average"
    main("average", [f"--model={finished}", "--last=2", f"--output={average}"])
    main("prune", [f"--model={finished}", "--keep_last=1", "--dry_run"])
    main("prune", [f"--model={finished}", "--keep_last=1"])
    output = capsys.readouterr().out
    assert "step 9: " in output and " MB deleted" in output
    found = files_below(as_path("a", finished))
    assert "evaluation/depth_table.json" in found
    assert not any(name.startswith("checkpoints/9/") for name in found)
    assert mt.load(average).description.startswith(f"run {average}, step 12")
