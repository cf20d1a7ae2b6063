"""A finished run, quantised by the command: report, folder, what reads it, and what refuses it."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file

import megatransformer_jax as mt
from megatransformer_jax.cli.commands import main
from megatransformer_jax.config.build import build
from megatransformer_jax.config.option import UserError
from megatransformer_jax.models.quantization import dequantize_weights

DEPTHS = (1, 4)


@pytest.fixture(scope="module")
def run(small_run, tmp_path_factory):
    """Trained long enough that its layers do something."""
    folder = tmp_path_factory.mktemp("quantize") / "run"
    changes = {
        "model": {"width": 32, "mlp": {"hidden_width": 64}},
        "train": {"steps": 40},
        "optimizer": {"learning_rate": 0.01},
        "checkpoint": {"every_steps": 40},
        "evaluation": {"every_steps": 40},
    }
    with mt.Trainer(build(small_run(folder, changes)), workdir=folder) as trainer:
        trainer.run()
    return folder


@pytest.fixture(scope="module")
def lm(run):
    return mt.load(run)


@pytest.fixture(scope="module")
def folder(run, tmp_path_factory):
    """int4 by GPTQ, made by the command."""
    output = tmp_path_factory.mktemp("quantized") / "int4"
    main(
        "quantize",
        [
            f"--model={run}",
            "--weights=int4",
            "--group=16",
            "--method=gptq",
            "--calibration_batches=2",
            "--depths=1,4",
            "--num_batches=1",
            f"--output={output}",
        ],
    )
    return output


def kl(lm, small):
    report = lm.divergence(small, depths=DEPTHS, num_batches=1)
    return {row["depth"]: row["kl"] for row in report.rows}


def test_the_command_writes_what_load_reads(lm, folder):
    small = mt.load(folder)
    assert small.config == lm.config
    assert small.num_parameters == lm.num_parameters
    assert small.tokenizer.digest() == lm.tokenizer.digest()
    about = json.loads((folder / "quantization.json").read_text())
    assert [row["depth"] for row in about["report"]] == [1, 4]
    assert about["quantization"]["method"] == "gptq"


def test_generation_with_a_cache_equals_that_with_the_matrices_that_are_meant(folder):
    small = mt.load(folder)
    meant = dataclasses.replace(small._loaded, params=dequantize_weights(small.params))
    options = {"strategy": "greedy", "max_new_tokens": 12, "exit_criterion": "latent_diff"}
    found, expected = (each.generate("The ", **options) for each in (small, mt.Model(meant)))
    assert found.token_ids == expected.token_ids
    assert found.depths == expected.depths


def test_gptq_calibrated_on_all_iterations_is_closer_than_rounding(lm, folder):
    options = {"weights": "int4", "group": 16}
    rounded, corrected = kl(lm, lm.quantize(**options)), kl(lm, mt.load(folder))
    for depth in DEPTHS:
        assert corrected[depth] < 0.7 * rounded[depth]
    assert kl(lm, lm.quantize())[4] < 0.1 * rounded[4]


def test_a_quantised_model_saves_itself(lm, tmp_path):
    small = lm.quantize(include=r"^core/.*mlp", activations="int8")
    again = mt.load(small.save(tmp_path / "saved"))
    np.testing.assert_array_equal(again("The ").logits, small("The ").logits)
    with pytest.raises(UserError, match="is quantised, and other formats have float weights"):
        small.save(tmp_path / "huginn", format="huginn")
    with pytest.raises(UserError, match="is quantised already"):
        again.quantize()
    mt.export_program(small, tmp_path / "program", chunk=8)
    stored = load_file(tmp_path / "program" / "parameters.safetensors")
    assert {array.dtype.name for array in stored.values()} == {"float32", "int8"}


def test_training_averaging_and_the_like_refuse_it(run, folder, tmp_path):
    config = mt.configure(run / "config.json", fine_tuning={"init_from": str(folder)})
    refused = r"is a quantised model\. It can be .* name what it was made from: run .*, step 40"
    with pytest.raises(UserError, match=refused):
        mt.Trainer(config, workdir=tmp_path / "more").step()
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    with pytest.raises(UserError, match=refused):
        mt.Trainer(mt.configure(run / "config.json"), workdir=copy).step()
    with pytest.raises(SystemExit):
        main("average", [f"--model={folder}", "--last=1", f"--output={tmp_path / 'mean'}"])


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"weights": "int2"}, r"weights: 'int2' .*'int8', 'int4'"),
        ({"group": 7}, "group: 7 is odd; use an even number"),
        ({"include": ("absent",)}, "include: 'absent' matches nothing"),
        ({"calibration_batches": 2}, "calibration_batches: 2 would be ignored"),
        ({"method": "gptq", "calibration_files": ("a.pdf",)}, r"calibration_files: '\.pdf' is not"),
        ({"bits": 4}, "bits: no such option"),
    ],
)
def test_options_that_cannot_be_used(lm, options, problem):
    with pytest.raises(UserError, match=problem):
        lm.quantize(**options)


def test_a_model_without_data_can_be_rounded_but_not_calibrated():
    lm = mt.create("tiny", tokenizer=mt.BytesTokenizer(), core_layers=1, seed=0)
    with pytest.raises(UserError, match="calibration_files: is missing; method='awq' needs text"):
        lm.quantize(method="awq")
    small = lm.quantize()
    with pytest.raises(UserError, match="files: is missing"):
        lm.divergence(small)
    other = mt.create("tiny", tokenizer=mt.BytesTokenizer(), core_layers=2, seed=0)
    with pytest.raises(UserError, match="has another architecture"):
        lm.divergence(other)


def test_folders_that_cannot_be_used(run, folder, tmp_path):
    with pytest.raises(SystemExit):
        main("quantize", [f"--model={run}", f"--output={folder}"])
    with pytest.raises(UserError, match=r"step: 3 does not go with .* a quantised model"):
        mt.load(folder, step=3)
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    about = json.loads((folder / "quantization.json").read_text())
    path = "core/layers/layer_0/mlp/up"
    changed = about | {
        "matrices": about["matrices"] | {path: about["matrices"][path] | {"bits": 8}}
    }
    (broken / "quantization.json").write_text(json.dumps(changed))
    with pytest.raises(UserError, match=rf"tensor '{path}/values' has shape .*needs \(32, 128\)"):
        mt.load(broken)
    (broken / "quantization.json").write_text(json.dumps(about | {"version": 2}))
    with pytest.raises(UserError, match="is of version 2 and not 1"):
        mt.load(broken)
    (broken / "quantization.json").write_text(json.dumps(about | {"matrices": {}}))
    with pytest.raises(UserError, match=r"lacks the tensors .*layer_0/mlp/up.*quantise the model"):
        mt.load(broken)
