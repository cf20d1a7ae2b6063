"""Costs of a run from its config: what is shown, and that nothing of the model's size is made."""

import dataclasses
import io
import json
import pathlib
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import jax
import pytest
from rich.console import Console

from megatransformer_jax.config.build import build
from megatransformer_jax.config.option import ConfigError
from megatransformer_jax.config.recurrence import ExitGateConfig, StabilityConfig
from megatransformer_jax.config.run import RunConfig
from megatransformer_jax.models.cost.memory import tree_bytes
from megatransformer_jax.models.megatransformer import build_model, init_params
from megatransformer_jax.runs.cost import (
    CostReport,
    format_bytes,
    format_number,
    make_report,
    print_tables,
)
from megatransformer_jax.sharding.rules import Sharder
from megatransformer_jax.training.optimizers import build_optimizer
from megatransformer_jax.types import DTypePolicy

GIB = 2**30
Values = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def config(small_run: Values) -> RunConfig:
    return build(small_run("runs/unused"))


@pytest.fixture(scope="module")
def report(config: RunConfig) -> CostReport:
    return make_report(config)


def inspect(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "experiments.inspect", *words],
        capture_output=True,
        text=True,
        cwd=pathlib.Path(__file__).parents[2],
        check=False,
    )


# The child tells its own peak: Linux counts what its parent held at the fork into `ru_maxrss`.
INSPECT_AND_TELL_PEAK = r"""
import re, runpy, sys
runpy.run_module("experiments.inspect", run_name="__main__", alter_sys=True)
print(re.search(r"VmHWM:\s+(\d+) kB", open("/proc/self/status").read())[1], file=sys.stderr)
"""


def test_huginn_is_inspected_without_allocating_it(
    tmp_path: pathlib.Path, repository: pathlib.Path
) -> None:
    path = tmp_path / "cost.json"
    words = ["--config.preset=huginn_3_5b", "--config.evaluation.final_depths=1,32"]
    words += ["--config.mesh.fsdp=1"]
    process = subprocess.run(
        [sys.executable, "-c", INSPECT_AND_TELL_PEAK, *words, f"--json={path}"],
        capture_output=True,
        text=True,
        cwd=repository,
        check=True,
    )
    text = process.stdout
    peak_kib = int(process.stderr.split()[-1])
    assert peak_kib * 1024 < 2 * GIB  # The parameters alone would be 13 GiB.

    assert "3,564,976,800" in text
    assert "54.3G" in text  # Effective parameters at depth 32.
    report = json.loads(path.read_text())
    assert [row["depth"] for row in report["depths"]] == [1, 32]
    assert report["memory"]["parameters"] == 4 * 3_564_976_800
    # 2 + 2 layers, and 4 in each iteration; keys and values of width 5280 in float32.
    assert report["depths"][1]["cache_bytes"] == (4 + 4 * 32) * 2 * 5280 * 4


def test_bad_input_is_one_line(tmp_path: pathlib.Path) -> None:
    done = inspect("--config.preset=tiny", f"--output={tmp_path}/absent/cost.json")
    assert done.returncode == 2
    assert "absent/cost.json cannot be written" in done.stderr
    assert "Traceback" not in done.stderr


def test_training_state_of_one_device_is_that_of_real_arrays(
    config: RunConfig, report: CostReport
) -> None:
    memory = report.memory
    model = build_model(config.model, DTypePolicy(), Sharder(), "cpu")
    params = init_params(model, jax.random.key(0))
    assert memory.parameters == memory.gradients == tree_bytes(params)
    moments = build_optimizer(config.optimizer, config.train.steps).init(params)
    assert memory.optimizer == tree_bytes(moments)
    assert memory.gathered == 0


def test_a_mesh_divides_the_state_and_the_batch(small_run: Values, report: CostReport) -> None:
    alone = report.memory
    mesh = {"mesh": {"data": 2, "fsdp": 2, "tensor": 2}}  # Of no device that is here.
    meshed = make_report(build(small_run("runs/unused", mesh)))
    memory = meshed.memory
    assert meshed.mesh == {"data": 2, "fsdp": 2, "tensor": 2, "sequence": 1}
    # All but the norms is cut in four, except the adapter, whose width is cut over fsdp only.
    assert alone.parameters / 4 < memory.parameters < alone.parameters / 3
    assert memory.optimizer == pytest.approx(2 * memory.parameters, rel=0.01)
    assert memory.gathered == 2 * memory.parameters
    # Rows are cut in four, heads and hidden units in two more; the states between layers are not.
    assert alone.per_iteration / 8 < memory.per_iteration < alone.per_iteration / 5


def test_accumulation_halves_what_is_kept_and_adds_a_sum_of_gradients(
    small_run: Values, report: CostReport
) -> None:
    whole = report.memory
    values = small_run("runs/unused", {"train": {"accumulation": 2}})
    parts = make_report(build(values)).memory
    assert (parts.summed, whole.summed) == (whole.gradients, 0)
    assert parts.activations == pytest.approx(whole.activations / 2, rel=0.05)


def test_what_is_frozen_has_no_gradients_and_no_moments(
    small_run: Values, report: CostReport
) -> None:
    options = {"train_only": ["^final_norm"]}
    part = make_report(build(small_run("unused", {"fine_tuning": options}))).memory
    assert part.parameters == report.memory.parameters
    assert (part.gradients, part.optimizer) == (4 * 16, pytest.approx(8 * 16, abs=16))
    options = {"init_from": "runs/base", "lora": {"rank": 2}, "base_precision": "int8"}
    lora = make_report(build(small_run("unused", {"fine_tuning": options}))).memory
    assert lora.merged == report.memory.parameters and report.memory.merged == 0
    assert lora.parameters < report.memory.parameters
    assert lora.gradients < report.memory.gradients / 2


def test_depths_are_the_configured_ones(report: CostReport) -> None:
    one, two, four = report.depths
    assert [one.depth, two.depth, four.depth] == [1, 2, 4]
    assert four.forward_flops - two.forward_flops == 2 * (two.forward_flops - one.forward_flops)
    # Gradients through the last two: the others cost a third.
    gain = two.train_flops - one.train_flops
    assert four.train_flops - two.train_flops == pytest.approx(2 / 3 * gain)
    assert one.hardware_train_flops == two.hardware_train_flops == two.train_flops


def test_a_model_without_core_has_one_row(small_run: Values) -> None:
    values = small_run("runs/unused", {"model": {"core_layers": 0}})
    del values["model"]["recurrence"]
    config = build(values)
    report = make_report(config)
    assert [row.depth for row in report.depths] == [None]
    assert report.depths[0].train_flops == 3 * report.depths[0].forward_flops
    assert report.memory.per_iteration == 0
    assert "iteration" not in shown(report, config, is_terminal=False)


def test_a_mesh_that_does_not_fit_is_an_error(small_run: Values) -> None:
    with pytest.raises(ConfigError, match="num_kv_heads"):
        make_report(build(small_run("runs/unused", {"mesh": {"tensor": 4}})))


def test_tables_are_plain_where_there_is_no_terminal(config: RunConfig, report: CostReport) -> None:
    assert shown(report, config, is_terminal=False).isascii()
    text = shown(report, config, is_terminal=True)
    assert "╭" in text
    for word in ("attention", "feed-forward", "2 *", "executed, at most", "optimiser state"):
        assert word in text


def shown(report: CostReport, config: RunConfig, *, is_terminal: bool) -> str:
    file = io.StringIO()
    print_tables(Console(file=file, force_terminal=is_terminal, width=140), report, config)
    return file.getvalue()


def test_passes_that_are_not_counted_are_named(config: RunConfig, report: CostReport) -> None:
    assert "leave out" not in shown(report, config, is_terminal=False)
    model = dataclasses.replace(config.model, exit_gate=ExitGateConfig(enabled=True))
    stability = StabilityConfig(jacobian_weight=0.1)
    train = dataclasses.replace(config.train, stability=stability)
    both = dataclasses.replace(config, model=model, train=train)
    text = " ".join(shown(report, both, is_terminal=False).split())
    assert "leave out the exit gate's own pass and the probe of the core's Jacobian." in text


def test_media_are_counted_per_medium_and_their_places_per_token() -> None:
    dit = {"width": 8, "num_layers": 1, "num_heads": 2, "hidden_width": 8}
    image = {
        "prelude_layers": 0,
        "decoder": {"kind": "dit", "dit": dit, "unet": {"base_width": 48}},
    }
    audio = {"coda_layers": 0, "decoder": {"dilations": (1,)}}
    data = {"source": "media", "tokenizer": {"kind": "bytes"}, "sequence_length": 64}
    tasks = ("draw=1", "speak=1", "which=1")
    config = build(
        {
            "preset": "multimodal_tiny",
            "model": {"core_layers": 1, "image": image, "audio": audio},
            "data": data | {"media": {"tasks": tasks, "images_per_row": 2}},
        }
    )
    report = make_report(config)
    assert {"image_prelude", "audio_decoder"} < set(report.parameters)
    assert report.places == 64 + 2 * 16 + 16
    text = shown(report, config, is_terminal=False)
    for words in (
        "one clip of 64 frames",
        "to be made: all steps",
        "rows of 112 tokens and places",
    ):
        assert words in text
    json.dumps(report.to_dict())


def test_numbers_have_three_digits_and_a_prefix() -> None:
    numbers = {0: "0", 999: "999", 1000: "1k", 1234: "1.23k", 12_345: "12.3k", 3.56e9: "3.56G"}
    assert {value: format_number(value) for value in numbers} == numbers
    sizes = {0: "0 B", 1023: "1023 B", 1024: "1 KiB", 1536: "1.50 KiB", 13.3 * GIB: "13.3 GiB"}
    assert {value: format_bytes(value) for value in sizes} == sizes
    assert format_number(999_700) == "1.00M"
