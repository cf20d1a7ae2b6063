"""Saves that fail and checkpoints that are cut: one line, at once; what is whole stays so."""

import contextlib
import errno
import os
import pathlib
import shutil
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import pytest

from megatransformer_jax.checkpoints.manager import CheckpointManager, DamagedCheckpoint
from megatransformer_jax.config.loop import CheckpointConfig
from megatransformer_jax.config.option import UserError
from megatransformer_jax.failures import NoAnswer, SaveFailed

KEEP_ALL = CheckpointConfig(keep_last=100)
RUN = {"config": {"checkpoint": {}}}
PROGRAM = """
import pathlib, shutil, sys
import jax.numpy as jnp
from megatransformer_jax.checkpoints.manager import CheckpointManager
from megatransformer_jax.cli.launch import errors_in_one_line
from megatransformer_jax.config.loop import CheckpointConfig
folder = pathlib.Path(sys.argv[1])
with errors_in_one_line():
    manager = CheckpointManager(folder, CheckpointConfig())
    manager.save(1, {"a": jnp.ones(4)}, {}, {})
    manager.wait()
    folder.rename(folder.with_name("away"))
    folder.write_text("")
    try:
        manager.save(2, {"a": jnp.ones(4)}, {}, {})
        manager.wait()
    finally:
        manager.close()
"""


def state(value: float = 1.0) -> dict[str, jax.Array]:
    return {"params": jnp.full((64, 64), value), "step": jnp.int32(value)}


def abstract() -> dict[str, jax.ShapeDtypeStruct]:
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), state()
    )


def test_a_save_that_fails_in_the_background_is_told_once_with_what_is_whole(tmp_path):
    problems: list[Exception] = []

    def before_commit() -> None:
        if problems:
            raise problems[0]

    manager = CheckpointManager(tmp_path, KEEP_ALL, before_commit)
    manager.save(1, state(), {}, RUN)
    manager.wait()
    problems.append(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
    manager.save(2, state(2), {}, RUN)
    message = (
        r"^the checkpoint of step 2 could not be saved in .* \(No space left on device\)\. "
        r"Make room there, then start the same command again: it resumes from step 1, the newest "
        r"whole checkpoint\.$"
    )
    with pytest.raises(SaveFailed, match=message):
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            manager.check()  # It does not wait.
            time.sleep(0.01)
    manager.close()  # Nor does it raise again.
    again = CheckpointManager(tmp_path, KEEP_ALL)
    assert again.steps() == [1]
    again.close()


def test_what_a_commit_is_refused_for_is_raised_as_it_is(tmp_path):
    refusal = UserError("another run has taken over")

    def before_commit() -> None:
        raise refusal

    manager = CheckpointManager(tmp_path, KEEP_ALL, before_commit)
    manager.save(1, state(), {}, RUN)
    with pytest.raises(UserError) as error:
        manager.wait()
    assert error.value is refusal
    manager.close()
    assert not (tmp_path / "1").exists()


def test_a_program_whose_folder_is_gone_ends_at_once_with_one_line(tmp_path):
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path / "checkpoints")],
        capture_output=True,
        text=True,
        env={**os.environ, "XLA_FLAGS": ""},
        timeout=120,
        check=False,
    )
    assert done.returncode == 3, done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: the checkpoint of step 2 could not be saved in ")
    assert "Put the folder back, then start the same command again" in last
    assert time.monotonic() - started < 60  # It waited for over five minutes.
    with pytest.raises(UserError, match=r"checkpoints is a file, not the folder"):
        CheckpointManager(tmp_path / "checkpoints", KEEP_ALL)


def test_every_file_of_a_checkpoint_that_is_cut_is_either_not_needed_or_named(tmp_path):
    whole = tmp_path / "whole"
    manager = CheckpointManager(whole, KEEP_ALL)
    for step in (1, 2):
        manager.save(step, state(step), {"next": step}, RUN)
    manager.close()
    files = [path for path in sorted((whole / "2").rglob("*")) if path.is_file()]
    outcomes = {}
    for path in files:
        for size in {0, path.stat().st_size // 2}:
            name = path.relative_to(whole)
            cut = tmp_path / f"{'_'.join(name.parts)}_{size}"
            shutil.copytree(whole, cut)
            os.truncate(cut / name, size)
            outcomes[str(name), size] = outcome(cut)
    assert set(outcomes.values()) <= {"damaged", "read"}, outcomes
    needed = {name for (name, _), found in outcomes.items() if found == "damaged"}
    arrays = {name for name, _ in outcomes if "/d/" in name}
    assert arrays and arrays & needed, outcomes
    assert {"2/data/metadata", "2/run/metadata", "2/state/manifest.ocdbt"} <= needed


def outcome(folder: pathlib.Path) -> str:
    """What comes of reading the newest checkpoint; values that differ would be an error."""
    try:
        with contextlib.closing(CheckpointManager(folder, None)) as manager:
            found = manager.run_info(2), manager.restore(abstract(), 2)
    except DamagedCheckpoint as error:
        assert "delete that folder to resume from step 1" in str(error)
        return "damaged"
    assert found[0] == RUN and found[1].iterator_state == {"next": 2}
    assert bool((found[1].state["params"] == 2).all()) and int(found[1].state["step"]) == 2
    return "read"


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (ValueError("UNAVAILABLE: Error reading gs://bucket/2/state/manifest.ocdbt"), NoAnswer),
        (OSError("Forbidden: b/bucket"), UserError),
    ],
)
def test_storage_that_does_not_let_read_is_no_damage(error, kind, tmp_path, monkeypatch):
    def refused(*_, **__):
        raise error

    manager = CheckpointManager(tmp_path, KEEP_ALL)
    monkeypatch.setattr(manager._manager, "restore", refused)
    with pytest.raises(kind, match=rf"^{tmp_path}/2 (cannot be reached|may not be read)") as raised:
        manager.run_info(2)
    assert not isinstance(raised.value, DamagedCheckpoint)
    manager.close()
