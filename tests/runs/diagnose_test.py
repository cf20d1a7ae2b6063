"""Figures of a run that is over, from the command line."""

import json

import pytest
from written_run import write_run

from megatransformer_jax.cli.commands import main as command
from megatransformer_jax.config.build import build


@pytest.fixture(scope="module")
def workdir(tmp_path_factory, small_run):
    folder = tmp_path_factory.mktemp("diagnosed")
    write_run(build(small_run(folder, {"model": {"core_layers": 1}})), {4: None})
    return folder


def test_figures_and_numbers_are_written(workdir, tmp_path, capsys):
    options = ["--kinds=recurrence,attention_maps", "--num_steps=3", "--num_rows=1"]
    command("diagnose", [f"--model={workdir}", f"--output={tmp_path / 'out'}", *options])
    assert f"figures and numbers: {tmp_path / 'out'}" in capsys.readouterr().out
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"recurrence.png", "attention_maps.png", "scalars.json"}
    numbers = json.loads((tmp_path / "out" / "scalars.json").read_text())
    assert set(numbers) == {"residual", "contraction", "state_norm"}
    assert not (workdir / "diagnostics").exists()


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (["--kinds=depth_draws"], "--kinds: 'depth_draws' is for a run that is going on"),
        (["--kinds=recurence"], "--kinds: ('recurence',) is not allowed"),
        (["--num_rows=0"], "--num_rows: 0 is not allowed"),
        (["--num_rows=9"], "--num_rows: 9 rows are more than a batch has, data.batch_size=8; use"),
        (["--num_steps=0"], "--num_steps: 0 is not allowed"),
        (["--step=5"], "has no such checkpoint"),
        (["--model=/no/such/folder"], "no such folder"),
    ],
)
def test_what_cannot_be_used_is_an_error(workdir, options, problem, capsys):
    with pytest.raises(SystemExit) as caught:
        command("diagnose", [f"--model={workdir}", *options])
    assert caught.value.code == 2
    assert problem in capsys.readouterr().err
