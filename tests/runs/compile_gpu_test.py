"""Programs for GPUs that are not here: what is special of them, and a whole one with the plugin."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest

from megatransformer_jax.compiled.chips import chip_of
from megatransformer_jax.runs import compile as compiling
from megatransformer_jax.sharding.topology import parse_topology
from megatransformer_jax.training.micro_batch import StepMemory

CHIP = chip_of(parse_topology("h100-8"))
PLUGINS = ("jax_cuda13_plugin", "jax_cuda12_plugin")


@pytest.mark.parametrize(("gib", "fits"), [(59, True), (61, False)])
def test_what_is_larger_than_jaxs_share_of_a_gpu_does_not_fit(gib, fits):
    """Its compiler finishes what is too large, other than that for TPUs."""
    memory = StepMemory(arguments=2**30, outputs=0, temporaries=(gib - 1) * 2**30)
    program = compiling.CompiledProgram("train step", 1.0, 2.0, memory, 0, "", {}, "HloModule")
    checked = compiling._checked_gpu_memory(program, CHIP)
    assert checked.fits is fits
    assert checked.memory == memory  # What is known is shown.
    if not fits:
        assert "needs 61 GiB, and JAX takes 60 GiB of the GPU's memory" in checked.problem


@pytest.mark.skipif(
    not any(map(importlib.util.find_spec, PLUGINS)), reason="needs JAX's CUDA plugin"
)
def test_a_train_step_for_two_machines_is_compiled_without_a_gpu(tmp_path):
    words = [
        *("--config.preset=tiny", "--config.data.batch_size=8", "--config.data.sequence_length=64"),
        *("--config.mesh.data=2", "--config.mesh.fsdp=2", "--topology=h100-2", "--slices=2"),
        *("--config.train.precision=bfloat16", f"--json={tmp_path / 'gpu.json'}"),
    ]
    program = "import sys; from megatransformer_jax.cli.commands import main; "
    done = subprocess.run(
        [sys.executable, "-c", program + "main('compile', sys.argv[1:])", *words],
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads((tmp_path / "gpu.json").read_text())
    assert (report["chips"], report["device_kind"]) == (4, "NVIDIA H100 80GB HBM3")
    assert report["attention"][0]["kernel"] == "cudnn"
    (read,) = [program["readings"][0] for program in report["programs"]]
    assert read["flops"] > read["kernel_flops"] > 0
    exchanged = {(item["kind"], *item["axes"]): item for item in read["collectives"]}
    assert exchanged["all-gather", "fsdp"]["dtype"] == "bf16"
    assert not exchanged["all-gather", "fsdp"]["is_between_slices"]
    assert exchanged["all-reduce", "data"]["is_between_slices"]
