"""Models by their names on a hub, and how much memory it takes to read a model of many shards."""

import pathlib
import re
import subprocess
import sys
from collections.abc import Iterator

import jax
import numpy as np
import pytest
from hub_server import Hub, serve_hub
from huginn_values import HUGINN, huginn_values

import megatransformer_jax as mt
from megatransformer_jax.checkpoints.folders import save_folder
from megatransformer_jax.cli.commands import main
from megatransformer_jax.config.model import ModelConfig
from megatransformer_jax.models.megatransformer import build_model, init_params
from megatransformer_jax.sharding.rules import Sharder
from megatransformer_jax.types import DTypePolicy

constants = pytest.importorskip("huggingface_hub.constants")

MEBIBYTE = 2**20
SHARD = 8 * MEBIBYTE


@pytest.fixture
def hub(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """The hub that the library asks, and an empty cache."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    with serve_hub() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
        template = hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        yield hub


def test_a_name_is_as_good_as_a_folder(
    hub: Hub, tmp_path: pathlib.Path, capfd: pytest.CaptureFixture[str]
) -> None:
    lm = mt.create(HUGINN.read_config(huginn_values()), seed=1)
    folder = lm.save(tmp_path / "model", format="huginn")
    hub.add("org/name", folder, "v1")
    found = mt.load("org/name", revision="v1")
    assert found.description == "Huginn model org/name@v1"
    jax.tree.map(np.testing.assert_array_equal, found.params, lm.params)
    words = ["--prompt_ids=1,2", "--max_new_tokens=2", "--strategy=greedy", "--depth=2"]
    main("generate", ["--model=org/name@v1", *words])
    assert re.fullmatch(r"1 2( \d+){2}\n", capfd.readouterr().out)
    with pytest.raises(mt.UserError, match=r"org/name has no such branch, tag or commit"):
        mt.load("org/name", revision="v2")
    capfd.readouterr()
    with pytest.raises(SystemExit):
        main("generate", ["--model=org/nothing", *words])
    error = capfd.readouterr().err
    assert error.startswith("error: org/nothing: no such folder in ") and error.count("\n") == 1


PEAK = """
import pathlib, sys
import jax
from megatransformer_jax.checkpoints.folders import open_folder
from megatransformer_jax.runs.load import load_model

def kibibytes(name):
    status = pathlib.Path("/proc/self/status").read_text()
    return int(status.split(name + ":")[1].split()[0])

small, large = sys.argv[1:]
open_folder(small).params(place=lambda path, tensor: None)
load_model(small)
for read in (
    lambda: open_folder(large).params(place=lambda path, tensor: None),
    lambda: load_model(large).params,
):
    before = kibibytes("VmRSS")
    pathlib.Path("/proc/self/clear_refs").write_text("5")
    kept = read()
    print((kibibytes("VmHWM") - before) * 1024)
    del kept
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_model_of_many_shards_takes_less_than_two_of_them(tmp_path: pathlib.Path) -> None:
    sizes = {"n_embd": 256, "intermediate_size": 1024}
    configs = {"small": huginn_values(), "large": huginn_values(**sizes, n_layers_in_coda=20)}
    for name, values in configs.items():
        _write(tmp_path / name, HUGINN.read_config(values))
    total = sum(file.stat().st_size for file in (tmp_path / "large").glob("*.safetensors"))
    assert len([*(tmp_path / "large").glob("*.safetensors")]) > 10 and total > 10 * SHARD
    done = subprocess.run(
        [sys.executable, "-c", PEAK, str(tmp_path / "small"), str(tmp_path / "large")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    dropped, kept = map(int, done.stdout.split())
    assert dropped < 2 * SHARD
    # Measured: 6.1 MiB of 92.7. On a CPU the parameters themselves are in the same memory.
    assert kept < total + 2 * SHARD


def _write(folder: pathlib.Path, config: ModelConfig) -> None:
    model = build_model(config, DTypePolicy(), Sharder(), "cpu")
    shapes = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
    params = jax.tree.map(lambda leaf: np.ones(leaf.shape, np.float32), shapes)
    save_folder(folder, HUGINN, config, params, max_shard_bytes=SHARD)
