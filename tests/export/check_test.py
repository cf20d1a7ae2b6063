"""Programs of both formats next to the model, and a check that sees a wrong weight."""

import functools
import shutil

import numpy as np
import pytest
from exported_tiny import CRITERIA, loaded, program_config, written
from tiny_model import PLAIN, tiny

from megatransformer_jax.config.exporting import ProgramConfig
from megatransformer_jax.export import check
from megatransformer_jax.export.folder import export_program
from megatransformer_jax.export.program import build_programs

OURO = tiny(
    exit_gate={"enabled": True},
    recurrence={"adapter": "none", "state_init": "none", "backprop_depth": 3},
)
# Within the cache's slots and beyond.
DEPTHS = (2, 11)


@functools.cache
def model_and_programs(format):
    """The same objects, so that nothing compiles twice."""
    lm = loaded()
    return lm, build_programs(lm.model, lm.params, lm.trained_depth, program_config(format))


def compare(format, folder):
    return check.check_program(folder, *model_and_programs(format))


@pytest.mark.parametrize("format", CRITERIA)
def test_logits_iterations_and_tokens_are_those_of_the_model(format, monkeypatch):
    monkeypatch.setattr(check, "DEPTHS", DEPTHS)
    rows = compare(format, written(format)).rows
    depths = {(row["criterion"], row["depth"]): row["mean_depth"] for row in rows}
    assert [*depths] == [(name, depth) for name in CRITERIA[format] for depth in DEPTHS]
    for row in rows:
        assert row["passed"], row
        assert row["same_as_generate"] == 1 and row["same_iterations"]
        assert row["difference"] <= (0 if format == "stablehlo" else 2e-5)
    deepest = DEPTHS[-1]
    assert all(1 < depths[name, deepest] < deepest for name in CRITERIA[format])


def test_a_wrong_weight_is_seen(tmp_path, monkeypatch):
    monkeypatch.setattr(check, "DEPTHS", (2,))
    folder = shutil.copytree(written("onnx"), tmp_path / "copy")
    weights = np.fromfile(folder / "weights.bin", np.float32)
    weights[-16:] += 0.01
    weights.tofile(folder / "weights.bin")
    report = compare("onnx", folder)
    assert not any(row["passed"] for row in report.rows)
    assert "NO" in str(report)


@pytest.mark.parametrize(
    ("model", "options", "depth"),
    [(PLAIN, {}, 0), (OURO, {"criterion": ("fixed",), "gate_readout": "threshold"}, 3)],
    ids=["without_a_core", "read_by_its_gate"],
)
def test_other_models_are_exported_too(model, options, depth, tmp_path, monkeypatch):
    monkeypatch.setattr(check, "DEPTHS", (3,))
    config = ProgramConfig(format="onnx", capacity=64, chunk=16, check=True, **options)
    (row,) = export_program(loaded(model), tmp_path / "other", config).rows
    assert row["passed"] and row["mean_depth"] == depth, row
