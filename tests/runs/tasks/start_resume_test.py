"""A run does not go on over data that has changed."""

import json
import pathlib
from typing import Any

import pytest
from absl import logging

from megatransformer_jax.checkpoints.compatibility import CheckpointMismatch
from megatransformer_jax.config.data import DataConfig
from megatransformer_jax.config.run import RunConfig
from megatransformer_jax.runs.tasks.start import check_workdir, run_info


class SavedOnce:
    """Stands in for a checkpoint manager with step 1."""

    directory = pathlib.Path("runs/mine/checkpoints")

    def __init__(self, run: dict[str, Any]):
        self._run = json.loads(json.dumps(run))

    def latest_step(self) -> int:
        return 1

    def run_info(self, step: int) -> dict[str, Any]:
        return self._run


@pytest.fixture
def corpus(tmp_path: pathlib.Path) -> pathlib.Path:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n{"text": "b"}\n')
    return path


def config(corpus: pathlib.Path) -> RunConfig:
    return RunConfig(data=DataConfig(source="jsonl", files=(str(corpus),)))


def test_a_file_that_grew_is_an_error_that_shows_both(corpus: pathlib.Path):
    saved = SavedOnce(run_info(config(corpus), "digest"))
    check_workdir(config(corpus), saved)
    with corpus.open("a") as file:
        file.write('{"text": "c"}\n')
    with pytest.raises(CheckpointMismatch) as error:
        check_workdir(config(corpus), saved)
    message = str(error.value)
    assert "the data has changed since the checkpoint runs/mine/checkpoints/1" in message
    assert "saved 1 files, 28 bytes, sha256" in message
    assert "now   1 files, 42 bytes, sha256" in message
    assert "another workdir" in message


def test_a_checkpoint_without_a_fingerprint_is_a_warning(
    corpus: pathlib.Path, monkeypatch: pytest.MonkeyPatch
):
    warnings: list[str] = []
    monkeypatch.setattr(logging, "warning", lambda text, *values: warnings.append(text % values))
    run = run_info(config(corpus), "digest")
    del run["data"]
    check_workdir(config(corpus), SavedOnce(run))
    assert any("did not note what the data was" in warning for warning in warnings)
