"""Checkpoints are pruned by rules, never under a run that writes."""

import numpy as np
import pytest

from megatransformer_jax.checkpoints.manager import CheckpointManager
from megatransformer_jax.cli.commands import main as command
from megatransformer_jax.config.build import build, to_dict
from megatransformer_jax.config.loop import CheckpointConfig
from megatransformer_jax.config.option import UserError
from megatransformer_jax.runs.workdir import hold_workdir

LOSSES = {4: 1.0, 8: 3.0, 12: 2.0, 16: 2.5}
ACCURACIES = {4: 0.1, 8: 0.4, 12: 0.2, 16: 0.3}


@pytest.fixture
def workdir(tmp_path, small_run):
    folder = tmp_path / "run"
    config = build(small_run(folder, {"checkpoint": {"keep_last": 9}}))
    checkpoints = CheckpointManager(folder / "checkpoints", CheckpointConfig(keep_last=9))
    for step, loss in LOSSES.items():
        scores = {"validation/loss": loss, "validation/accuracy": ACCURACIES[step]}
        state = {"params": {"kernel": np.zeros(99, np.float32)}}
        checkpoints.save(step, state, {}, {"config": to_dict(config)}, scores)
    checkpoints.close()
    (folder / "train.log").write_text("")
    return folder


def steps(folder) -> list[int]:
    checkpoints = CheckpointManager(folder / "checkpoints", None)
    found = checkpoints.steps()
    checkpoints.close()
    return found


def test_a_dry_run_says_what_pruning_then_does(workdir, capsys):
    arguments = [f"--model={workdir}", "--keep_last=1", "--keep_best=1"]
    # A run may be going on.
    with hold_workdir(workdir):
        command("prune", [*arguments, "--dry_run"])
    planned = capsys.readouterr().out
    assert "step 8: 0." in planned and "MB would be deleted\nstep 12" in planned
    assert "would be freed; kept: 4, 16" in planned
    assert steps(workdir) == [4, 8, 12, 16]
    command("prune", arguments)
    assert capsys.readouterr().out == planned.replace("would be ", "")
    assert steps(workdir) == [4, 16]


@pytest.mark.parametrize(
    ("rules", "kept"),
    [
        (["--keep_last=1", "--keep_best=2", "--best_metric=validation/accuracy"], [8, 16]),
        (["--keep_last=1", "--keep_best=1", "--best_mode=max"], [8, 16]),
        (["--keep_last=1", "--keep_best=0", "--keep_every_steps=12"], [12, 16]),
        ([], [4, 8, 12, 16]),
    ],
)
def test_rules_that_are_not_given_are_those_of_the_run(workdir, rules, kept):
    command("prune", [f"--model={workdir}", *rules])
    assert steps(workdir) == kept


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        (["--keep_last=0"], "--keep_last: 0 is not allowed; it must be at least 1"),
        (["--keep_every_steps=6"], "--keep_every_steps: 6 is not a multiple of every_steps=4"),
        (["--best_metric=bleu"], "--best_metric: 'bleu' is not allowed"),
        (
            ["--best_metric=validation/exact_accuracy"],
            "--best_metric: no checkpoint of",
        ),
    ],
)
def test_rules_that_cannot_be_used_are_an_error(workdir, capsys, rules, message):
    with pytest.raises(SystemExit) as ended:
        command("prune", [f"--model={workdir}", *rules])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
    assert steps(workdir) == [4, 8, 12, 16]


def test_nothing_is_pruned_while_a_run_writes(workdir, capsys):
    with hold_workdir(workdir):
        with pytest.raises(SystemExit):
            command("prune", [f"--model={workdir}", "--keep_last=1"])
        assert "a run is writing to this workdir" in capsys.readouterr().err
        with pytest.raises(UserError, match="a run is writing"), hold_workdir(workdir):
            pass
    assert steps(workdir) == [4, 8, 12, 16]
    with hold_workdir(workdir):
        pass


def test_a_folder_without_checkpoints_is_an_error(tmp_path, capsys):
    with pytest.raises(SystemExit):
        command("prune", [f"--model={tmp_path}"])
    assert "has no checkpoints; name the folder of a run" in capsys.readouterr().err
