"""Checkpoints are averaged into a workdir that everything else can read."""

import dataclasses
import pathlib
import re

import jax
import numpy as np
import pytest
from written_run import write_run

from megatransformer_jax.checkpoints.compatibility import CheckpointMismatch
from megatransformer_jax.checkpoints.manager import CheckpointManager
from megatransformer_jax.cli.commands import main as command
from megatransformer_jax.config.build import build, load_config, merge, to_dict
from megatransformer_jax.config.loop import CheckpointConfig
from megatransformer_jax.runs.build import build_sharded_model
from megatransformer_jax.runs.load import load_model
from megatransformer_jax.runs.tasks.start import check_workdir, run_info
from megatransformer_jax.runs.tokenizers import start_tokenizer
from megatransformer_jax.training.evaluation_params import evaluation_params, find_average
from megatransformer_jax.training.optimizers import build_optimizer
from megatransformer_jax.training.state import init_state

TINY = {
    "model": {"prelude_layers": 0, "coda_layers": 0, "vocab_size": 400},
    "data": {"tokenizer": {"kind": "sentencepiece"}},
    "checkpoint": {"keep_last": 9},
}
LOSSES = {2: 1.0, 4: 3.0, 6: 2.0, 8: None}
ACCURACIES = {2: 0.1, 4: 0.3, 6: 0.2}


@pytest.fixture(scope="module")
def run(tmp_path_factory, small_run):
    """The workdir and the parameters by step."""
    folder = tmp_path_factory.mktemp("average") / "run"
    params = write_run(build(merge(small_run(folder), TINY)), LOSSES, ACCURACIES)
    return folder, params


def files(folder: pathlib.Path) -> set[tuple[pathlib.Path, int]]:
    return {(path, path.stat().st_mtime_ns) for path in folder.rglob("*")}


@pytest.mark.parametrize(
    ("which", "steps"),
    [
        (["--last=2"], [6, 8]),
        (["--best=2"], [2, 6]),
        (["--best=2", "--metric=validation/accuracy"], [4, 6]),
        (["--steps=8,2"], [2, 8]),
    ],
    ids=str,
)
def test_the_average_is_the_mean_of_what_was_saved(run, tmp_path, capsys, which, steps):
    folder, params = run
    before = files(folder)
    out = tmp_path / "out"
    command("average", [f"--model={folder}", f"--output={out}", *which])
    listed = ", ".join(map(str, steps))
    assert capsys.readouterr().out == f"mean of steps {listed} of {folder} -> {out}\n"
    assert files(folder) == before
    loaded, original = load_model(out), load_model(folder)
    assert loaded.description == f"run {out}, step {steps[-1]} (latest)"
    assert loaded.tokenizer.digest() == original.tokenizer.digest()
    assert loaded.config == original.config

    def compare(mean, *leaves):
        wanted = np.mean(np.stack(leaves).astype(np.float64), axis=0).astype(np.float32)
        np.testing.assert_array_equal(mean, wanted)

    jax.tree.map(compare, loaded.params, *(params[step] for step in steps))


def test_no_run_goes_on_from_an_average(run, tmp_path):
    folder, _ = run
    out = tmp_path / "out"
    command("average", [f"--model={folder}", f"--output={out}", "--last=2"])
    config = load_config(out / "config.json")
    assert config.workdir == str(out)
    checkpoints = CheckpointManager(out / "checkpoints", None)
    assert checkpoints.run_info(8)["averaged"] == {"from": str(folder), "steps": [6, 8]}
    with pytest.raises(CheckpointMismatch, match=r"holds parameters only.*fine_tuning\.init_from"):
        check_workdir(config, checkpoints)
    checkpoints.close()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--last=5"], "--last: 5, but only 4 checkpoints"),
        (["--last=0"], "--last: 0 is not allowed; it must be at least 1"),
        (["--best=4"], "--best: 4, but only 3 checkpoints .* have a finite validation/loss"),
        (["--best=1", "--metric=bleu"], "--metric: 'bleu' is not known; known: validation/loss"),
        (["--last=2", "--metric=validation/loss"], "would be ignored"),
        (["--steps=2,3"], "has no step 3; there are 2, 4, 6, 8"),
        (["--steps=2,2"], "each step once"),
        (["--steps=a"], "'a' is not a whole number"),
        ([], "--last: is missing; give one of last, best and steps"),
        (["--last=1", "--best=1"], "--best: does not go together with --last"),
    ],
)
def test_what_cannot_be_averaged_is_an_error_of_one_line(run, tmp_path, capsys, arguments, message):
    with pytest.raises(SystemExit) as ended:
        command("average", [f"--model={run[0]}", f"--output={tmp_path / 'out'}", *arguments])
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert re.search(message, error)
    assert not (tmp_path / "out").exists()


def test_a_workdir_with_checkpoints_is_not_written_to(run, capsys):
    with pytest.raises(SystemExit):
        command("average", [f"--model={run[0]}", f"--output={run[0]}", "--last=2"])
    assert "has checkpoints already; name another folder" in capsys.readouterr().err


def test_other_architectures_are_refused(tmp_path, small_run, capsys):
    folder = tmp_path / "run"
    values = small_run(folder)
    other = merge(values, {"model": {"mlp": {"hidden_width": 24}}})
    checkpoints = CheckpointManager(folder / "checkpoints", CheckpointConfig())
    for step, config in ((2, build(values)), (4, build(other))):
        run = {"config": to_dict(config)}
        checkpoints.save(step, {"params": {"a": np.zeros(1, np.float32)}}, {}, run)
    checkpoints.close()
    with pytest.raises(SystemExit):
        command("average", [f"--model={folder}", f"--output={tmp_path / 'out'}", "--last=2"])
    assert "model.mlp.hidden_width: saved 16, now 24" in capsys.readouterr().err


def test_the_average_of_weights_is_averaged_where_the_run_keeps_one(tmp_path, small_run):
    folder, out = tmp_path / "run", tmp_path / "out"
    changes = {"train": {"ema_decay": 0.9}, "data": {"tokenizer": {"kind": "bytes"}}}
    config = build(merge(merge(small_run(folder), TINY), changes))
    folder.mkdir()
    tokenizer = start_tokenizer(config, folder)
    model, _ = build_sharded_model(config)
    optimizer = build_optimizer(config.optimizer, config.train.steps, config.train.ema_decay)
    state = jax.jit(lambda key: init_state(model, optimizer, key))(jax.random.key(0))
    wanted = evaluation_params(state, config)
    checkpoints = CheckpointManager(folder / "checkpoints", CheckpointConfig(keep_last=9))
    for step, factor in ((1, 1.0), (2, 3.0)):
        average = find_average(state.opt_state)
        scaled = average._replace(average=jax.tree.map(lambda x: factor * x, wanted))  # noqa: B023
        opt_state = jax.tree.map(
            lambda node: scaled if node is average else node,  # noqa: B023
            state.opt_state,
            is_leaf=lambda node: node is average,  # noqa: B023
        )
        saved = dataclasses.replace(state, opt_state=opt_state)
        checkpoints.save(step, saved, {}, run_info(config, tokenizer.digest()))
    checkpoints.close()
    command("average", [f"--model={folder}", f"--output={out}", "--last=2"])
    assert load_config(out / "config.json").train.ema_decay is None
    jax.tree.map(
        lambda mean, one: np.testing.assert_allclose(mean, 2 * one, rtol=1e-6),
        load_model(out).params,
        wanted,
    )
