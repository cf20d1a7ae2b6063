"""The learning-rate range test, end to end on a tiny run."""

import json

import pytest

from megatransformer_jax.config.build import build
from megatransformer_jax.config.option import UserError
from megatransformer_jax.runs.find_lr import find_learning_rate


def test_it_writes_a_suggestion_and_no_checkpoint(tmp_path, small_run, capsys):
    optimizer = {"name": "sgd", "schedule": "constant", "groups": ["embedding: learning_rate=0.5"]}
    config = build(small_run(tmp_path, {"optimizer": optimizer, "train": {"ema_decay": 0.9}}))
    result = find_learning_rate(config, 1e-3, 10.0, 16)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["find_lr.json", "find_lr.png"]
    written = json.loads((tmp_path / "find_lr.json").read_text())
    assert written["optimizer"] == "sgd"
    assert written["suggestion"] == result.suggestion == result.minimum / 10
    assert written["learning_rates"][0] == pytest.approx(1e-3)
    assert len(written["losses"]) == len(written["learning_rates"]) <= 16
    assert min(result.smoothed) < result.losses[0] - 0.1
    shown = capsys.readouterr().out
    assert f"--config.optimizer.learning_rate={result.suggestion:.1e}" in shown
    assert (tmp_path / "find_lr.png").read_bytes().startswith(b"\x89PNG")


def test_a_bad_range_is_an_error_before_anything_is_built(tmp_path, small_run):
    config = build(small_run(tmp_path / "absent"))
    with pytest.raises(UserError, match="--end="):
        find_learning_rate(config, 1.0, 0.1, 100)
    assert not (tmp_path / "absent").exists()
