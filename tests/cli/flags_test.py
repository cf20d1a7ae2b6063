"""The command line of runs: sources, precedence, overrides of every option, errors."""

import json
import pathlib
from typing import Any

import pytest
from other_values import companions, new_value

from megatransformer_jax.cli import flags
from megatransformer_jax.cli.checkpoint_commands import EXPORT
from megatransformer_jax.cli.commands import COMPARE, DIAGNOSE, TRAIN
from megatransformer_jax.config.build import build, save_config
from megatransformer_jax.config.option import Option, UserError, options_of
from megatransformer_jax.config.run import RunConfig
from megatransformer_jax.config.run_kinds import AllOptions

EXPERIMENT = """
def get_config(arg=""):
    return {
        "preset": "recurrent_small",
        "model": {"width": 128},
        "train": {"steps": 100, "seed": 1},
    }
"""


def parse(*words: str) -> RunConfig:
    config = flags.parse(TRAIN, words).config
    assert config is not None
    return config


@pytest.fixture
def experiment(tmp_path: pathlib.Path) -> str:
    path = tmp_path / "mine.py"
    path.write_text(EXPERIMENT)
    return f"--config={path}"


def test_the_command_line_wins_over_file_over_preset_over_default(experiment: str) -> None:
    config = parse(experiment, "--config.train.seed=2")
    assert config.train.seed == 2  # Command line over file.
    assert config.train.steps == 100  # File over default.
    assert config.model.width == 128  # File over preset.
    assert config.model.mlp.hidden_width == 704  # Preset.
    assert config.train.max_bad_steps == 20  # Default.


def test_a_preset_on_the_command_line_goes_under_the_file(experiment: str) -> None:
    config = parse(experiment, "--config.preset=tiny")
    assert config.preset == "tiny"
    assert config.model.width == 128  # The file still wins.
    assert config.model.mlp.hidden_width == 176  # The other preset.


def test_a_preset_can_be_removed_on_the_command_line(experiment: str) -> None:
    config = parse(experiment, "--config.preset=None", "--config.model.mlp.hidden_width=99")
    assert config.preset is None
    assert config.model.mlp.hidden_width == 99


def test_a_preset_alone_gives_the_defaults_of_that_size() -> None:
    assert parse("--config.preset=tiny") == build({"preset": "tiny"})
    with pytest.raises(
        UserError, match=r"--config: no experiment given; name one \(audio, .*huginn_pod, image"
    ):
        parse("--config.train.steps=3")


def test_shipped_experiments_are_found_by_name_and_sizes_too() -> None:
    assert parse("--config=recurrent:tiny") == parse(
        "--config=experiments/configs/recurrent.py:tiny"
    )
    assert parse("--config=tiny", "--config.train.steps=70").preset == "tiny"


def test_a_preset_that_a_file_hides_is_an_error(tmp_path: pathlib.Path) -> None:
    save_config(build({"preset": "tiny"}), tmp_path / "config.json")
    with pytest.raises(UserError, match="preset: 'huginn_3_5b' would be ignored"):
        parse(f"--config={tmp_path}/config.json", "--config.preset=huginn_3_5b")


def test_a_saved_config_reproduces_the_run(experiment: str, tmp_path: pathlib.Path) -> None:
    config = parse(experiment, "--config.optimizer.clip_norm=None", "--config.samples.prompts=a,b")
    save_config(config, tmp_path / "config.json")
    again = parse(f"--config={tmp_path}/config.json")
    assert repr(again) == repr(config)
    changed = parse(f"--config={tmp_path}/config.json", "--config.train.steps=70")
    assert changed.train.steps == 70


def test_yaml_json_and_python_describe_the_same_run(
    experiment: str, tmp_path: pathlib.Path
) -> None:
    values = {
        "preset": "recurrent_small",
        "model": {"width": 128},
        "train": {"steps": 100, "seed": 1},
    }
    (tmp_path / "mine.json").write_text(json.dumps(values))
    (tmp_path / "mine.yml").write_text(
        "preset: recurrent_small\nmodel: {width: 128}\ntrain:\n  steps: 100\n  seed: 1\n"
    )
    config = parse(experiment)
    assert parse(f"--config={tmp_path}/mine.json") == config
    assert parse(f"--config={tmp_path}/mine.yml") == config


OPTIONS = list(options_of(AllOptions))


@pytest.mark.parametrize("option", OPTIONS, ids=[option.path for option in OPTIONS])
def test_every_option_can_be_overridden(option: Option, tmp_path: pathlib.Path) -> None:
    (tmp_path / "empty.json").write_text("{}")
    value = new_value(option)
    assert value != option.default or option.check.choices == (value,)
    more = companions(option.path)
    config: Any = parse(f"--config={tmp_path}/empty.json", *more, f"--config.{option.path}={value}")
    for part in option.path.split("."):
        config = getattr(config, part)
    assert config == value
    assert type(config) is type(value)


@pytest.mark.parametrize(
    ("word", "value"),
    [
        ("--config.data.shuffle=false", False),
        ("--noconfig.data.shuffle", False),
        ("--config.data.shuffle", True),
        ("--config.data.shuffle=True", True),
    ],
)
def test_a_switch_has_all_usual_forms(word: str, value: bool) -> None:
    assert parse("--config.preset=tiny", word).data.shuffle is value


@pytest.mark.parametrize("text", ["1,2,4", "(1,2,4)", "[1, 2, 4]", "(1, 2, 4,)"])
def test_a_tuple_has_all_usual_forms(text: str) -> None:
    config = parse("--config.preset=tiny", f"--config.evaluation.final_depths={text}")
    assert config.evaluation.final_depths == (1, 2, 4)


def test_a_value_may_follow_after_a_space() -> None:
    config = parse(
        "--config.preset", "tiny", "--config.mesh.data", "-1", "--config.train.steps", "99"
    )
    assert (config.preset, config.mesh.data, config.train.steps) == ("tiny", -1, 99)


@pytest.mark.parametrize(
    ("word", "problem"),
    [
        ("--config.model.widht=3", r"model\.widht: no such option; did you mean 'width'"),
        ("--config.modle.width=3", r"modle: no such option; did you mean 'model'"),
        (
            "--config.model.width.x=3",
            r"model\.width\.x: .*model\.width is an option, not a section",
        ),
        ("--config.recurrence.mean_steps=3", r"in full, --config\.model\.recurrence\.mean_steps"),
        ("--config.model=3", r"--config\.model: is a section"),
        ("--config.model.width=wide", r"config\.model\.width=wide: 'wide' is not a whole number"),
        ("--config.model.width=-3", r"model\.width: -3 is not allowed; it must be at least 1"),
        ("--config.data.shuffle=maybe", r"'maybe' is not true or false"),
        ("--config.model.attention.num_heads=7", r"64 is not divisible by attention\.num_heads=7"),
        ("--config.preset=huge", r"preset: 'huge' is unknown; it must be one of gpt2_small"),
        ("--config=missing.yaml", r"missing\.yaml: no such config file"),
        ("--verbosity=1", r"--verbosity: no such option; --help lists all"),
        ("stray", r"'stray' is not an option"),
        (
            "--config=recurent",
            r"--config: 'recurent' is not an experiment; did you mean 'recurrent",
        ),
        ("--config.train.steps", r"config\.train\.steps"),
    ],
)
def test_bad_input_is_named(word: str, problem: str) -> None:
    with pytest.raises(UserError, match=problem):
        parse("--config.preset=tiny", word)


def test_full_help_lists_every_option() -> None:
    text = flags.help_page(TRAIN, full=True)
    for option in OPTIONS:
        assert f"--config.{option.path} (" in text
    assert max(map(len, flags.help_page(TRAIN).splitlines())) <= 100


def test_old_names_are_other_names_of_options() -> None:
    for words in (["--from=runs/a"], ["--workdir=runs/a"], ["--model", "runs/a"]):
        assert (
            flags.parse(DIAGNOSE, [*words, "--out=b"]).options
            == flags.parse(DIAGNOSE, ["--model=runs/a", "--output=b"]).options
        )
    with pytest.raises(
        UserError, match=r"--(model|from) is another name of --model; give one of the two"
    ):
        flags.parse(DIAGNOSE, ["--from=runs/a", "--model=runs/b"])
    assert not flags.parse(EXPORT, ["--output=b", "--no-rotary_table"]).options.rotary_table


def test_words_are_collected_where_there_are_some() -> None:
    parsed = flags.parse(COMPARE, ["runs/a", "--output=x.png", "runs/b"])
    assert parsed.options.model == ("runs/a", "runs/b")
    assert flags.parse(COMPARE, ["--model=runs/a", "runs/b"]).options.model == ("runs/a", "runs/b")
