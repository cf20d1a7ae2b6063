"""Folders of other projects are recognised by their config.json."""

import json

import numpy as np
import pytest
from huginn_values import HUGINN, huginn_values, small_huginn

from megatransformer_jax.checkpoints.folders import (
    FORMATS,
    format_named,
    format_of,
    load_folder,
    open_folder,
    save_folder,
)
from megatransformer_jax.checkpoints.safetensors_files import WeightsFileError
from megatransformer_jax.checkpoints.tensor_map import FormatError
from megatransformer_jax.config.loop import FOREIGN_FORMATS
from megatransformer_jax.config.model import ModelConfig
from megatransformer_jax.config.option import UserError


def test_the_command_line_knows_every_format():
    assert tuple(format.name for format in FORMATS) == FOREIGN_FORMATS
    assert [format_named(name).name for name in FOREIGN_FORMATS] == list(FOREIGN_FORMATS)
    with pytest.raises(UserError, match=r"format: 'hugin' is unknown; did you mean 'huginn'\?"):
        format_named("hugin")


def test_every_format_recognises_its_own_configs_alone():
    for format in FORMATS:
        is_looped = format.name in ("huginn", "ouro", "parcae")
        config = small_huginn()[0] if is_looped else ModelConfig(core_layers=0)
        values = format.write_config(config)
        assert [other for other in FORMATS if other.recognises(values)] == [format]
        if format.name == "parcae":  # Its class says it, and is all that does.
            continue
        del values["model_type"]  # Then `architectures` says it.
        assert [other for other in FORMATS if other.recognises(values)] == [format]
    old = huginn_values()
    assert [format.name for format in FORMATS if format.recognises(old)] == ["huginn"]


@pytest.mark.parametrize(
    "values",
    [
        {"model_type": "Mamba", "architectures": ["MambaForCausalLM"]},
        {"architectures": ["MambaForCausalLM"]},
        {"_class_name": "Mamba"},
    ],
    ids=str,
)
def test_an_unknown_architecture_lists_the_known_ones(values):
    with pytest.raises(
        FormatError, match=r"^m/config.json: .*Mamba.* known ones are Huginn"
    ) as error:
        format_of({"model_type": "", **values}, "m/config.json")
    assert all(format.title in str(error.value) for format in FORMATS)


def test_a_config_of_ours_is_of_no_format(tmp_path):
    assert format_of({"model": {"width": 32}, "train": {}}, "config.json") is None
    (tmp_path / "config.json").write_text('{"width": 32}')
    with pytest.raises(FormatError, match="names no architecture"):
        open_folder(tmp_path)


def test_a_missing_shard_is_named(tmp_path):
    config, params = small_huginn()
    save_folder(tmp_path / "model", HUGINN, config, params, max_shard_bytes=20_000)
    next((tmp_path / "model").glob("model-00002-of-*")).unlink()
    with pytest.raises(WeightsFileError, match=r"names files .* not there: model-00002-of-"):
        load_folder(tmp_path / "model")


def test_parameters_are_given_to_place_by_their_paths(tmp_path):
    config, params = small_huginn()
    save_folder(tmp_path / "model", HUGINN, config, params)
    placed = {}
    load_folder(tmp_path / "model", place=placed.__setitem__)
    down = params["core"]["layers"]["layer_1"]["mlp"]["down"]
    np.testing.assert_array_equal(placed["core/layers/layer_1/mlp/down"], down)
    values = json.loads((tmp_path / "model" / "config.json").read_text())
    assert values["model_type"] == "huginn_raven"


def test_more_layers_than_tensors(tmp_path):
    """Found before anything is made for each of them."""
    config, params = small_huginn()
    save_folder(tmp_path / "model", HUGINN, config, params)
    path = tmp_path / "model" / "config.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps(values | {"n_layers_in_coda": 10**9, "n_layers": 10**9 + 2}))
    with pytest.raises(FormatError, match=r"asks for 10{8}\d layers, but the weights"):
        open_folder(path.parent)
