"""Checkpoints in a bucket, where nothing is renamed: the last object says which are whole."""

import jax.numpy as jnp
import numpy as np
import pytest

from megatransformer_jax.checkpoints import manager as managing
from megatransformer_jax.checkpoints.manager import CheckpointManager
from megatransformer_jax.config.loop import CheckpointConfig
from megatransformer_jax.storage import as_path, files_below, tree_bytes

STATE = {"params": {"kernel": jnp.arange(6.0).reshape(2, 3)}}
MARKER = "commit_success.txt"


@pytest.fixture
def folder(gs_bucket, request):
    return as_path("a", f"{gs_bucket.url}/manager_buckets_test/{request.node.name}")


def save(manager, *steps):
    for step in steps:
        manager.save(step, STATE, {"row": step}, {"config": {}}, {"validation/loss": 1.0 / step})


def numbers(folder) -> set[str]:
    """Checkpoints of which anything is there."""
    return {name.partition("/")[0] for name in files_below(folder)}


def test_a_round_trip_and_the_rules_of_retention(folder):
    manager = CheckpointManager(folder, CheckpointConfig(keep_last=1, keep_best=0))
    save(manager, 1, 2, 3)
    manager.close()
    assert numbers(folder) == {"3"}
    reader = CheckpointManager(folder, None)
    assert reader.steps() == [3] and reader.scores(3) == {"validation/loss": 1 / 3}
    restored = reader.restore(STATE, 3)
    assert np.array_equal(restored.state["params"]["kernel"], STATE["params"]["kernel"])
    assert restored.iterator_state == {"row": 3}
    reader.close()


def test_pruning_counts_bytes_and_a_dry_run_deletes_nothing(folder):
    manager = CheckpointManager(folder, CheckpointConfig(keep_last=9))
    save(manager, 1, 2)
    manager.wait()
    rules = CheckpointConfig(keep_last=1, keep_best=0)
    size = tree_bytes(folder / "1")
    assert size > 100
    assert manager.prune(rules, is_dry_run=True) == {1: size}
    assert manager.steps() == [1, 2]
    assert manager.prune(rules) == {1: size}
    manager.close()
    assert numbers(folder) == {"2"}


def test_one_that_is_deleted_by_half_is_not_listed_and_is_removed(folder, monkeypatch):
    """As if the process were killed after its first request for the deletion."""
    manager = CheckpointManager(folder, CheckpointConfig(keep_last=9))
    save(manager, 1, 2)
    manager.wait()
    deleted = []
    monkeypatch.setattr(manager._manager, "delete", deleted.append)
    manager.prune(CheckpointConfig(keep_last=1, keep_best=0))
    assert deleted == [1]
    assert f"1/{MARKER}" not in files_below(folder) and "1" in numbers(folder)
    reader = CheckpointManager(folder, None)
    assert reader.steps() == [2]
    reader.close()
    again = CheckpointManager(folder, CheckpointConfig(keep_last=9))
    assert again.steps() == [2]
    again.close()
    assert numbers(folder) == {"2"}
    assert managing._WHOLE == MARKER
