"""A run, calibrated by the command: the table, the file, and who reads it."""

import json
import shutil

import pytest
from written_run import write_run

import megatransformer_jax as mt
from megatransformer_jax.cli.commands import main
from megatransformer_jax.config.build import build
from megatransformer_jax.config.option import UserError

STEP = 40
AUTO = {"exit_criterion": "latent_diff", "exit_threshold": "auto", "strategy": "greedy"}


@pytest.fixture(scope="module")
def run(small_run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("calibrate") / "run"
    recurrence = {"mean_steps": 4, "max_steps": 6, "iteration_norm": True, "state_init": "zero"}
    changes = {"model": {"recurrence": recurrence, "prelude_layers": 0, "coda_layers": 0}}
    write_run(build(small_run(folder, changes)), {STEP: 1.0})
    return folder


@pytest.fixture(scope="module")
def calibrated(run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("calibrated") / "run"
    shutil.copytree(run, folder)
    main(
        "calibrate",
        [
            f"--model={folder}",
            "--accuracy=0.9",
            "--criteria=latent_diff,margin",
            "--num_batches=1",
            "--sequence_length=8",
        ],
    )
    return folder


def test_the_file_says_what_for_and_generation_uses_it(calibrated):
    values = json.loads((calibrated / "calibration.json").read_text())
    assert (values["step"], values["weights"], values["depth"]) == (STEP, "average", 4)
    by_name = {row["criterion"]: row for row in values["rows"]}
    assert set(by_name) == {"latent_diff", "margin"}
    found = by_name["latent_diff"]
    assert found["accuracy"] >= 0.9 and 1 <= found["mean_steps"] <= 4
    lm = mt.load(calibrated)
    given = AUTO | {"exit_threshold": found["threshold"]}
    wanted = lm.generate("The ", max_new_tokens=6, **given)
    own = lm.generate("The ", max_new_tokens=6, **AUTO)
    assert (own.text, own.depths) == (wanted.text, wanted.depths)
    each = [{name: AUTO[name] for name in ("exit_criterion", "exit_threshold")}, {}]
    first, second = lm.generate(["The ", "If "], each=each, strategy="greedy", max_new_tokens=3)
    assert first.depths == wanted.depths[:3] and second.depths == (4, 4, 4)
    with pytest.raises(UserError, match=r"is for depth=4, and this is 2; set depth=4"):
        lm.generate("The ", depth=2, **AUTO)


def test_a_model_keeps_its_own_and_one_without_says_so(run):
    lm = mt.load(run)
    with pytest.raises(UserError, match=r"this model has none; run megatransformer calibrate"):
        lm.generate("The ", **AUTO)
    report = lm.calibrate(accuracy=0.5, criteria=("latent_diff",), num_batches=1, sequence_length=8)
    assert [row["criterion"] for row in report.rows] == ["fixed", "latent_diff"]
    assert report.rows[0]["mean_steps"] == 4 and "Cheapest exits" in str(report)
    assert max(lm.generate("The ", max_new_tokens=2, **AUTO).depths) <= 4
    with pytest.raises(UserError, match=r"'learned_gate' needs a model with an exit gate"):
        lm.calibrate(criteria=("learned_gate",))
