"""Runs become Huginn folders by a command."""

import json
import subprocess
import sys

import jax
import numpy as np
import pytest
from huginn_values import HUGINN_RUN
from written_run import write_run

from megatransformer_jax.cli.commands import main as command
from megatransformer_jax.config.build import build, merge
from megatransformer_jax.config.option import UserError
from megatransformer_jax.runs import checkpoint_tools
from megatransformer_jax.runs.load import load_model


@pytest.fixture(scope="module")
def run(tmp_path_factory, small_run):
    """A model of Huginn's architecture."""
    folder = tmp_path_factory.mktemp("export") / "run"
    write_run(build(merge(small_run(folder), HUGINN_RUN)), {2: 1.0, 4: 2.0})
    return folder


@pytest.mark.parametrize("step", ["latest", "best", "2"])
def test_the_exported_model_is_the_trained_one(run, tmp_path, capsys, step):
    output = tmp_path / "model"
    command("export", [f"--model={run}", f"--output={output}", f"--step={step}"])
    assert capsys.readouterr().out.startswith(f"run {run}, step {4 if step == 'latest' else 2}")
    trained, exported = load_model(run, step=step), load_model(output)
    jax.tree.map(np.testing.assert_array_equal, exported.params, trained.params)
    assert exported.tokenizer.digest() == trained.tokenizer.digest()
    assert exported.trained_depth == trained.trained_depth == 2
    tokens = jax.numpy.asarray([trained.tokenizer.encode("the fox")])
    outputs = [
        loaded.model.apply(
            {"params": loaded.params}, tokens, num_steps=2, rngs={"state": jax.random.key(1)}
        ).logits
        for loaded in (trained, exported)
    ]
    np.testing.assert_array_equal(*outputs)


def test_options_reach_the_files(run, tmp_path, caplog):
    output = tmp_path / "model"
    command("export", 
        [
            f"--model={run}", f"--output={output}", "--max_shard=8KiB", "--dtype=bfloat16",
            "--no-rotary_table",
        ]
    )  # fmt: skip
    names = sorted(path.name for path in output.iterdir())
    assert "model-00001-of-00003.safetensors" in names and "tokenizer.model" in names
    index = json.loads((output / "model.safetensors.index.json").read_text())
    assert "freqs_cis" not in index["weight_map"]
    assert json.loads((output / "config.json").read_text())["torch_dtype"] == "bfloat16"
    ids = json.loads((output / "generation_config.json").read_text())
    assert ids == {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    assert "has no place for model.residual_dropout_rate=0.1" in caplog.text
    command("export", [f"--model={run}", f"--output={output}", "--overwrite"])
    assert "model.safetensors" in [path.name for path in output.iterdir()]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--step=7"], "has no such checkpoint; it has the steps 2, 4"),
        (["--step=newest"], "--step: 'newest' is not a checkpoint; use best, latest or"),
        (["--max_shard=5"], "--max_shard: '5' is not a size; give a number above 0 and a unit"),
        (["--max_shard=0GiB"], "--max_shard: '0GiB' is not a size"),
        (["--max_shard=1gib"], "the units are B, KB, MB, GB, KiB, MiB, GiB"),
        (["--output={run}"], "is not empty"),
        (["--model={run}/absent"], "no such folder"),
        (["--format=lama"], "--format: 'lama' is not allowed; did you mean 'llama'?"),
        (["--format=llama"], "model.core_layers: 1, Llama has no core"),
        (["--format=llama", "--no-rotary_table"], "--rotary_table: False would be ignored with"),
    ],
)
def test_bad_options_are_one_line_and_exit_code_2(run, tmp_path, capsys, arguments, message):
    first = [f"--model={run}", f"--output={tmp_path / 'model'}"]
    with pytest.raises(SystemExit) as exit_:
        command("export", [*first, *(argument.format(run=run) for argument in arguments)])
    assert exit_.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and "Traceback" not in error
    assert list(tmp_path.iterdir()) == []


def test_a_huginn_folder_is_no_run(run, tmp_path):
    command("export", [f"--model={run}", f"--output={tmp_path / 'model'}"])
    with pytest.raises(SystemExit):
        command("export", [f"--model={tmp_path / 'model'}", f"--output={tmp_path / 'again'}"])


def test_a_full_disk_is_one_clear_error(run, tmp_path, monkeypatch, capsys):
    def fail(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint_tools, "save_folder", fail)
    with pytest.raises(SystemExit):
        command("export", [f"--model={run}", f"--output={tmp_path / 'model'}"])
    assert "cannot be written (No space left on device)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "size"), [("5GiB", 5 * 2**30), ("1.5 MB", 1_500_000), ("100B", 100), ("2KB", 2000)]
)
def test_sizes(text, size):
    assert checkpoint_tools.parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "-1GiB", "1e3B", "0.1B", "5 gigabytes"])
def test_what_is_no_size(text):
    with pytest.raises(UserError, match="give a number above 0 and a unit"):
        checkpoint_tools.parse_size(text)


def test_help_names_every_option_without_importing_jax(repository):
    code = "import sys, runpy; sys.argv = ['export', '--help']\ntry:\n"
    code += "    runpy.run_module('experiments.export', run_name='__main__')\n"
    code += "finally:\n    print('jax' in sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=repository, capture_output=True, text=True, check=True
    )
    for option in ("model", "output", "step", "max_shard", "dtype", "rotary_table", "overwrite"):
        assert f"--{option}" in result.stdout
    assert result.stdout.endswith("False\n")
