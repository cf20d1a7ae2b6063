"""The experiment on supervision and exits: what its variants change, and a run to its end."""

import json
import pathlib

from megatransformer_jax.config.build import configure
from megatransformer_jax.config.run import RunConfig
from megatransformer_jax.runs.train import train


def parse(variants: str) -> RunConfig:
    return configure(f"exits:{variants}", {})


def test_variants_say_which_iterations_have_a_loss() -> None:
    assert parse("").train.supervision.prior == "none"
    geometric = parse("geometric")
    assert geometric.train.supervision.is_alone
    assert geometric.model == parse("uniform").model == parse("").model
    assert parse("parity,uniform").data.reasoning.task == "parity"
    gate = parse("parity,uniform,gate")
    assert gate.train.exit_gate.target == "gain" and gate.train.supervision.prior == "none"
    assert gate.train.exit_gate.max_steps == gate.model.recurrence.mean_steps == 10
    assert gate.fine_tuning.init_from == parse("parity,uniform").workdir
    assert not gate.fine_tuning.trains("core/layers/layer_0/mlp/up")


def test_a_tiny_run_has_a_loss_at_every_iteration(tmp_path: pathlib.Path) -> None:
    changes = {
        "workdir": str(tmp_path / "run"),
        "train": {"steps": 6},
        "optimizer": {"warmup_steps": 2},
        "logging": {"every_steps": 6},
    }
    train(configure("exits:tiny,geometric", changes))
    table = json.loads((tmp_path / "run" / "depth_table.json").read_text())
    assert table["trained_depth"] == 6
    assert [row["depth"] for row in table["rows"]] == [1, 2, 6]
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert any("supervised_loss" in line for line in lines)
