"""Whole runs: a plain model gets recurrence and is trained on by LoRA over int8 weights."""

import shutil

import jax
import numpy as np
import pytest
from written_run import write_run

from megatransformer_jax.checkpoints.compatibility import CheckpointMismatch
from megatransformer_jax.config.build import build, merge
from megatransformer_jax.runs.load import load_model
from megatransformer_jax.runs.train import train
from megatransformer_jax.training.loop import StopRequest
from megatransformer_jax.training.recorder import read_metrics

pytestmark = pytest.mark.slow

SHORT = {
    "optimizer": {"learning_rate": 0.02, "warmup_steps": 0, "weight_decay": 0.5},
    "evaluation": {"every_steps": 4, "final_depths": [1]},
}
LORA = {
    "lora": {"rank": 2, "targets": [r"mlp/up$", r"core/adapter/state_kernel"]},
    "base_precision": "int8",
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory, small_run):
    """A plain model of two layers, as training leaves it."""
    workdir = tmp_path_factory.mktemp("plain")
    values = small_run(workdir, {"model": {"core_layers": 0}})
    values["model"]["recurrence"] = {}
    write_run(build(values), {8: None})
    return workdir


def retrofitted(small_run, workdir, source, **changes):
    options = {"init_from": str(source), "retrofit": True, **LORA}
    values = {
        "model": {"prelude_layers": 0, "recurrence": {"output_norm": False}},
        "train": {"steps": 4, "ema_decay": 0.9},
        "fine_tuning": options,
    }
    return build(merge(merge(small_run(workdir, SHORT), values), changes))


@pytest.fixture(scope="module")
def run(plain, tmp_path_factory, small_run):
    """A run that nothing interrupts."""
    workdir = tmp_path_factory.mktemp("retrofitted")
    return workdir, train(retrofitted(small_run, workdir, plain))


def losses(workdir):
    return [row["loss"] for row in read_metrics(workdir / "metrics.jsonl")]


def test_a_resumed_run_is_bit_exact_and_needs_its_source_no_more(
    plain, run, tmp_path, small_run, monkeypatch
):
    source = tmp_path / "source"
    shutil.copytree(plain, source)
    config = retrofitted(small_run, tmp_path / "run", source)
    monkeypatch.setattr(StopRequest, "is_due", lambda self, now: now == 2)
    assert not train(config).is_finished
    monkeypatch.undo()
    shutil.rmtree(source)
    result = train(config)
    assert result.is_finished and losses(tmp_path / "run") == losses(run[0])

    def compare(path, a, b):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes(), jax.tree_util.keystr(path)

    jax.tree_util.tree_map_with_path(compare, result.state, run[1].state)


def test_the_base_is_that_of_the_source_and_generation_gets_the_average(plain, run):
    state, loaded = run[1].state, load_model(run[0])
    core = loaded.params["core"]["layers"]["layer_0"]
    source = load_model(plain).params["prelude"]["layer_0"]
    # Not a target: int8 is all that has changed it.
    scale = np.abs(source["attention"]["qkv"]).max(0) / 127
    assert np.all(np.abs(core["attention"]["qkv"] - source["attention"]["qkv"]) <= 0.51 * scale)
    np.testing.assert_array_equal(
        core["attention_norm_in"]["scale"], source["attention_norm_in"]["scale"]
    )
    base = state.params["base"]["core"]["layers"]["layer_0"]["mlp"]["up"]
    assert base.qvalue.dtype == np.int8
    assert np.max(np.abs(core["mlp"]["up"] - source["mlp"]["up"])) > 0.01
    average = state.opt_state.average["lora"]["core"]["layers"]["layer_0"]["mlp"]["up"]
    stored = np.asarray(base.qvalue * base.scale)
    update = 16 / 2 * np.tensordot(average["a"], average["b"], 1)
    np.testing.assert_allclose(core["mlp"]["up"], stored + update, atol=1e-5)


def test_other_options_of_fine_tuning_are_another_run(plain, run, small_run):
    changed = {"fine_tuning": {"lora": {"alpha": 8.0}}}
    with pytest.raises(CheckpointMismatch, match=r"fine_tuning\.lora\.alpha: saved 16"):
        train(retrofitted(small_run, run[0], plain, **changed))
