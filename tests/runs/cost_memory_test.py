"""Predicted memory of training against what the compiler says of the step that trains."""

import re
from typing import Any

import jax
import pytest

from megatransformer_jax.config.build import build, merge, preset_folder, preset_names
from megatransformer_jax.config.option import ConfigError
from megatransformer_jax.models.megatransformer import build_model
from megatransformer_jax.runs.build import abstract_batches, abstract_train_state
from megatransformer_jax.runs.cost import make_report
from megatransformer_jax.sharding.mesh import make_mesh
from megatransformer_jax.sharding.rules import Sharder
from megatransformer_jax.training.micro_batch import compile_step, step_memory
from megatransformer_jax.training.optimizers import build_optimizer
from megatransformer_jax.training.step import make_train_step
from megatransformer_jax.types import DTypePolicy

LAYERS = {"width": 64, "vocab_size": 512, "attention": {"num_heads": 4}}
LAYERS |= {"mlp": {"hidden_width": 176}}
TEXT = {
    "model": LAYERS | {"prelude_layers": 3, "core_layers": 0, "coda_layers": 0},
    "data": {"batch_size": 8, "sequence_length": 128},
}
RECURRENT = {
    "model": LAYERS | {"core_layers": 1, "recurrence": {"mean_steps": 4, "backprop_depth": 3}},
    "data": {"batch_size": 8, "sequence_length": 128},
}
IMAGE = {"enabled": True, "height": 16, "width": 16, "channels": 1, "patch_size": 4}
IMAGE |= {"prelude_layers": 1, "coda_layers": 1, "context_length": 16}
DIT = {"width": 32, "num_layers": 2, "num_heads": 2, "hidden_width": 128, "patch_size": 2}
MEDIA = {
    "model": merge(RECURRENT["model"], {"image": IMAGE | {"decoder": {"kind": "dit", "dit": DIT}}}),
    "data": RECURRENT["data"]
    | {"source": "media", "tokenizer": {"kind": "bytes"}, "media": {"tasks": ["draw=1"]}},
}


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["none", "full"])
@pytest.mark.parametrize("values", [TEXT, RECURRENT, MEDIA], ids=["text", "recurrent", "media"])
def test_prediction_is_within_15_percent_of_the_compilers(
    values: dict[str, Any], remat: str
) -> None:
    config = build(merge(values, {"model": {"remat": remat}, "mesh": {"data": 1}}))
    sharder = Sharder(make_mesh(config.mesh, jax.devices()[:1]))
    model = build_model(config.model, DTypePolicy(), sharder, "cpu")
    optimizer = build_optimizer(config.optimizer, config.train.steps)
    state = abstract_train_state(model, optimizer, sharder, config.fine_tuning)
    (batch,) = abstract_batches(config, sharder)
    compiled = compile_step(make_train_step(model, optimizer, config), state, batch)
    predicted, real = make_report(config).memory.total, step_memory(compiled).total
    assert predicted == pytest.approx(real, rel=0.15)


MACHINE = re.compile(r"# Machine: (\d+) x (\S+), batch of (\d+) x (\d+) tokens\.")
ALL_MEDIA = {"tasks": ["draw=1", "caption=1", "speak=1", "transcribe=1"]}


@pytest.mark.parametrize(
    "name",
    [
        # A trace of several networks takes seconds.
        pytest.param(name, marks=pytest.mark.slow) if name.startswith("multimodal") else name
        for name in preset_names()
    ],
)
def test_a_preset_fits_the_machine_that_its_file_names(name: str) -> None:
    found = MACHINE.search((preset_folder() / f"{name}.gin").read_text())
    assert found is not None
    count, device, rows, length = found.groups()
    data: dict[str, Any] = {"batch_size": int(rows), "sequence_length": int(length)}
    if name.startswith("multimodal"):
        data |= {"source": "media", "tokenizer": {"kind": "bytes"}, "media": ALL_MEDIA}
    config = build({"preset": name, "data": data})
    if device == "cpu":
        assert make_report(config).memory.total < 2 * 2**30
        return
    report = make_report(config, device)
    assert device in report.fits
    assert report.mesh["fsdp"] == int(count)


def test_huginn_fits_because_of_remat_and_mesh() -> None:
    def predicted(changes: dict[str, Any]) -> float:
        values = merge({"preset": "huginn_3_5b"}, changes)
        return make_report(build(values), "v4").memory.total / 2**30

    # Compiled for 16 TPU v4 with libtpu 0.0.42, the step takes 26.64 GiB on each with attention by
    # XLA.
    by_xla = {"attention": {"kernel": "xla"}}
    with_xla = predicted({"model": by_xla})
    assert with_xla == pytest.approx(26.64, rel=0.15)
    assert predicted({"model": {**by_xla, "remat": "none"}}) > 100
    alone = {"mesh": {"fsdp": 1}, "data": {"batch_size": 1}}
    assert predicted({"model": by_xla, **alone}) > 32 * 1.5  # Of a v4.
    # The fused kernel keeps no attention weights.
    report = make_report(build({"preset": "huginn_3_5b"}), "v4")
    assert report.memory.total / 2**30 < with_xla - 8
    # A head's key and value, 96 each, take 256 lanes together; 2 + 2 layers and 4 per iteration.
    by_depth = {row.depth: row.cache_bytes for row in report.depths}
    assert by_depth[32] == (4 + 4 * 32) * 55 * 256 * 2


def test_a_gpu_is_only_known_where_there_is_one() -> None:
    with pytest.raises(ConfigError, match=r"device: 'h100'.*this machine has 'cpu'"):
        make_report(build({"preset": "tiny"}), "h100")
