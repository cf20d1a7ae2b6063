"""The experiment on rise and collapse: what its variants change, and a run to its end."""

import json
import pathlib

from megatransformer_jax.config.build import configure
from megatransformer_jax.config.run import RunConfig
from megatransformer_jax.runs.train import train


def parse(variants: str) -> RunConfig:
    return configure(f"collapse:{variants}", {})


def test_each_cure_changes_one_thing() -> None:
    base = parse("").model.recurrence
    assert (base.adapter, base.state_init, base.sampling) == ("none", "none", "fixed")
    assert base.mean_steps == base.backprop_depth == 4
    assert parse("linear").model.recurrence.adapter == "linear"
    assert parse("diagonal").model.recurrence.adapter == "diagonal"
    assert parse("random").model.recurrence.sampling == "uniform"
    assert parse("sandwich").model.norm.placement == "sandwich"
    drawn = parse("random_state,diagonal").model.recurrence
    assert (drawn.adapter, drawn.state_init) == ("diagonal", "normal")
    stability = parse("jacobian,fixed_point").train.stability
    assert stability.jacobian_weight > 0 and stability.fixed_point_weight > 0
    assert parse("fixed_point").train.stability.jacobian_weight == 0
    assert parse("language").data.source == "embedded_text"


def test_a_tiny_run_judges_depths_beyond_its_own(tmp_path: pathlib.Path) -> None:
    changes = {
        "workdir": str(tmp_path / "run"),
        "train": {"steps": 10},
        "logging": {"every_steps": 10},
        "evaluation": {"every_steps": 10},
    }
    train(configure("collapse:tiny,random,fixed_point", changes))
    table = json.loads((tmp_path / "run" / "depth_table.json").read_text())
    assert table["trained_depth"] == 4 and table["shown"][-1] == "exact_accuracy"
    assert [row["depth"] for row in table["rows"]] == [1, 2, 4, 8]
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert any("fixed_point_penalty" in line for line in lines)
