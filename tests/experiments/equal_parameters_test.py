"""The experiment on loops against parameters: what is equal, and a run to its end."""

import json
import pathlib

import pytest

from megatransformer_jax.config.build import configure
from megatransformer_jax.config.model import ModelConfig
from megatransformer_jax.models.cost.flops import forward_flops, train_flops
from megatransformer_jax.models.cost.parameter_counts import count_parameters, total_parameters
from megatransformer_jax.models.megatransformer import abstract_params, build_model
from megatransformer_jax.runs.train import train
from megatransformer_jax.sharding.rules import Sharder
from megatransformer_jax.types import DTypePolicy

TASKS = ("", "pointers", "permutation", "text")


def model_of(variants: str) -> ModelConfig:
    return configure(f"equal_parameters:{variants}", {}).model


def num_parameters(config: ModelConfig) -> int:
    model = build_model(config, DTypePolicy(), Sharder(), "cpu")
    return total_parameters(count_parameters(abstract_params(model)))


def step_flops(config: ModelConfig) -> float:
    forward = forward_flops(config, length=32)
    return train_flops(config, forward, config.recurrence.mean_steps).model


@pytest.mark.parametrize("task", ["", "text"])
def test_what_is_said_to_be_equal_is(task: str) -> None:
    looped, once, deep = (model_of(f"{task},{name}") for name in ("", "once", "deep"))
    assert looped.recurrence.adapter == "none" and looped.recurrence.sampling == "fixed"
    assert num_parameters(looped) == num_parameters(once) < num_parameters(deep)
    assert step_flops(looped) == pytest.approx(step_flops(deep))
    assert deep.core_layers == looped.core_layers * looped.recurrence.mean_steps


def test_the_tasks_differ_in_their_problems_only() -> None:
    tasks = [configure(f"equal_parameters:{task}", {}).data for task in TASKS]
    assert [data.reasoning.task for data in tasks[:3]] == ["mano", "pointers", "permutation"]
    assert tasks[3].source == "embedded_text"
    for data in tasks[:3]:
        reasoning = data.reasoning
        assert reasoning.eval_min_length == reasoning.eval_max_length == reasoning.max_length


def test_a_tiny_run_is_judged_by_loops(tmp_path: pathlib.Path) -> None:
    changes = {
        "workdir": str(tmp_path / "run"),
        "train": {"steps": 10},
        "logging": {"every_steps": 10},
        "evaluation": {"every_steps": 10, "num_batches": 1, "final_depths": (1, 6)},
    }
    train(configure("equal_parameters:tiny", changes))
    table = json.loads((tmp_path / "run" / "depth_table.json").read_text())
    assert table["trained_depth"] == 6 and table["shown"][-1] == "exact_accuracy"
    assert [row["depth"] for row in table["rows"]] == [1, 6]
