import dataclasses
import json
import pathlib
from typing import Any

import ml_collections
import pytest

from megatransformer_jax.config.build import build, load_config, merge, save_config, to_dict
from megatransformer_jax.config.option import ConfigError
from megatransformer_jax.config.run import RunConfig


def test_no_values_give_the_defaults() -> None:
    assert build({}) == RunConfig()


def test_an_unknown_key_is_named_with_its_path_and_the_nearest_name() -> None:
    with pytest.raises(ConfigError) as caught:
        build({"model": {"recurrence": {"mean_step": 4}}})
    assert caught.value.path == "model.recurrence.mean_step"
    assert "did you mean 'mean_steps'?" in str(caught.value)
    assert "backprop_depth" in str(caught.value)


@pytest.mark.parametrize(
    ("values", "path"),
    [
        ({"model": {"width": "256"}}, "model.width"),
        ({"model": {"attention": {"num_heads": 4.0}}}, "model.attention.num_heads"),
        ({"data": {"shuffle": 1}}, "data.shuffle"),
        ({"data": {"source": "text", "files": "a.txt"}}, "data.files"),
        ({"evaluation": {"final_depths": [1, "2"]}}, "evaluation.final_depths"),
        ({"optimizer": {"clip_norm": "1"}}, "optimizer.clip_norm"),
        ({"model": 3}, "model"),
        ({"model": None}, "model"),
        ({"train": {"steps": {"first": 1}}}, "train.steps"),
        ({3: 4}, "3"),
    ],
)
def test_a_wrong_type_is_named_with_its_path(values: dict[str, Any], path: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build(values)
    assert caught.value.path == path


def test_a_cross_field_error_has_the_full_path() -> None:
    with pytest.raises(ConfigError) as caught:
        build({"model": {"attention": {"num_heads": 4, "num_kv_heads": 3}}})
    assert caught.value.path == "model.attention.num_kv_heads"
    with pytest.raises(ConfigError) as caught:
        build({"model": {"recurrence": {"core_width": 90}}})
    assert caught.value.path == "model.recurrence.core_width"


def test_lists_become_tuples_and_whole_numbers_floats() -> None:
    config = build(
        {"evaluation": {"final_depths": [1, 2]}, "model": {"positions": {"rotary_base": 50000}}}
    )
    assert config.evaluation.final_depths == (1, 2)
    assert type(config.model.positions.rotary_base) is float


def test_a_preset_lies_below_the_other_values() -> None:
    config = build({"preset": "tiny", "model": {"width": 32}})
    assert (config.model.width, config.model.max_length) == (32, 256)
    assert config.preset == "tiny"
    with pytest.raises(ConfigError, match=r"'tinny' is unknown.*recurrent_small"):
        build({"preset": "tinny"})


def test_a_config_dict_is_read_like_a_dict() -> None:
    values = {"model": {"width": 64}, "evaluation": {"final_depths": (1, 4)}}
    assert build(ml_collections.ConfigDict(values)) == build(values)


def test_building_does_not_change_its_argument() -> None:
    values = {"preset": "tiny", "data": {"files": ["a.txt"], "source": "text"}}
    before = json.dumps(values)
    build(values)
    assert json.dumps(values) == before


def test_merge_replaces_leaves_only() -> None:
    under = {"a": {"x": 1, "y": (1, 2)}, "b": 1}
    assert merge(under, {"a": {"y": (3,)}}) == {"a": {"x": 1, "y": (3,)}, "b": 1}
    assert under == {"a": {"x": 1, "y": (1, 2)}, "b": 1}


UNUSUAL = {
    "preset": "huginn_3_5b",
    "workdir": "runs/ünïcode 'quoted' = \"x\"",
    "environment": ["XLA_FLAGS=--a=b --c=d,e"],
    "optimizer": {"learning_rate": 0.1 + 0.2, "clip_norm": None, "eps": 1e-12, "beta1": 0},
    "samples": {"prompts": ["a, b\n", ""]},
}


def test_a_saved_config_comes_back_identical(tmp_path: pathlib.Path) -> None:
    config = build(UNUSUAL)
    save_config(config, tmp_path / "config.json")
    again = load_config(tmp_path / "config.json")
    assert again == config
    assert repr(again) == repr(config)  # Types of numbers too.
    save_config(again, tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == (tmp_path / "config.json").read_bytes()


def test_a_saved_config_names_every_option(tmp_path: pathlib.Path) -> None:
    save_config(RunConfig(), tmp_path / "config.json")
    assert json.loads((tmp_path / "config.json").read_text()) == to_dict(RunConfig())
    names = {field.name for field in dataclasses.fields(RunConfig)}
    assert set(to_dict(RunConfig())) == names


def test_saving_replaces_the_file_in_one_step(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "config.json"
    save_config(RunConfig(), path)
    with path.open() as open_before:
        save_config(build({"train": {"seed": 7}}), path)
        assert json.load(open_before)["train"]["seed"] == 0
    assert load_config(path).train.seed == 7
    assert [file.name for file in tmp_path.iterdir()] == ["config.json"]
