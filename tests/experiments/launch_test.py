"""The command line: sources, precedence, overrides of every option, one-screen errors."""

import json
import os
import pathlib
import re
import subprocess
import sys
from typing import Any

import jax
import pytest
from other_values import companions, new_value

from experiments import launch
from megatransformer_jax.config.build import build, save_config
from megatransformer_jax.config.option import Option, UserError, options_of
from megatransformer_jax.config.run import RunConfig

EXPERIMENT = """
def get_config(arg=""):
    return {
        "preset": "recurrent_small",
        "model": {"width": 128},
        "train": {"steps": 100, "seed": 1},
    }
"""


def parse(*words: str) -> RunConfig:
    return launch.parse(["program", *words])


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
    with pytest.raises(UserError, match=r"no experiment given; add --config=FILE"):
        parse("--config.train.steps=3")


def test_a_preset_that_a_file_hides_is_an_error(tmp_path: pathlib.Path) -> None:
    save_config(build({"preset": "tiny"}), tmp_path / "config.json")
    with pytest.raises(UserError, match="preset=huginn_3_5b: would be ignored"):
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


OPTIONS = list(options_of(RunConfig))


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
        ("--verbosity=1", r"Unknown command line flag 'verbosity'"),
        ("stray", r"'stray' is no option"),
        ("--config.train.steps", r"config\.train\.steps"),
    ],
)
def test_bad_input_is_named(word: str, problem: str) -> None:
    with pytest.raises(UserError, match=problem):
        parse("--config.preset=tiny", word)


PROGRAM = '''"""Shows what an entry point sees."""
import sys
from absl import flags, logging
from experiments import launch

GREETING = flags.DEFINE_string("greeting", "hello", "What is said.")

def main(config):
    import os
    assert "jax" not in sys.modules
    from megatransformer_jax.config.option import UserError
    logging.info("an info message")
    if GREETING.value == "interrupt":
        import signal
        signal.signal(signal.SIGINT, signal.default_int_handler)  # xdist ignores it in children.
        os.kill(os.getpid(), signal.SIGINT)
        signal.pause()
    if GREETING.value == "fail":
        raise UserError("corpus.txt: is empty; name another file.")
    print(GREETING.value, config.model.width, os.environ.get("GIVEN"))

if __name__ == "__main__":
    launch.run(main)
'''


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    path = tmp_path_factory.mktemp("program") / "show.py"
    path.write_text(PROGRAM)
    return path


def run_program(program: pathlib.Path, *words: str) -> subprocess.CompletedProcess[str]:
    root = pathlib.Path(launch.__file__).parent.parent
    return subprocess.run(
        [sys.executable, str(program), *words],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(root)},
        check=False,
    )


def test_main_runs_with_the_environment_set_and_jax_not_yet_imported(program: pathlib.Path) -> None:
    done = run_program(
        program,
        "--config.preset=tiny",
        "--greeting=good day",
        "--config.environment=GIVEN=a=b c,OTHER=1",
    )
    assert (done.returncode, done.stdout) == (0, "good day 64 a=b c\n"), done.stderr
    assert "an info message" in done.stderr


def test_ctrl_c_is_one_line(program: pathlib.Path) -> None:
    done = run_program(
        program, "--config.preset=tiny", "--greeting=interrupt", "--config.logging.level=error"
    )
    assert done.returncode == 130
    assert done.stderr == "interrupted: nothing more is saved.\n"


def test_log_lines_begin_with_the_time(program: pathlib.Path) -> None:
    done = run_program(program, "--config.preset=tiny")
    assert re.fullmatch(r"\d\d:\d\d:\d\d an info message\n", done.stderr)


def test_the_level_of_messages_is_set(program: pathlib.Path) -> None:
    done = run_program(program, "--config.preset=tiny", "--config.logging.level=warning")
    assert done.returncode == 0
    assert "an info message" not in done.stderr


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["--config=experiments/configs/recurent.py"], "no such config file"),
        (["--config.preset=tiny", "--config.train.step=4"], "did you mean 'steps'"),
        (["--config.preset=tiny", "--config.data.batch_size=0"], "at least 1"),
        (["--config.preset=tiny", "--greeting=fail"], "corpus.txt: is empty"),
    ],
)
def test_bad_input_is_one_screen_without_a_traceback(
    program: pathlib.Path, words: list[str], problem: str
) -> None:
    done = run_program(program, *words)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    error = done.stderr[done.stderr.index("error: ") :]
    assert problem in error
    assert len(error) < 1000


def test_help_shows_examples_options_of_the_command_and_where_to_read_more(
    program: pathlib.Path,
) -> None:
    done = run_program(program, "--help")
    assert done.returncode == 0
    for words in (
        "Shows what an entry point sees.",
        "--config=experiments/configs/recurrent.py:tiny",
        "--config.model.recurrence.mean_steps=16",
        "docs/options.md",
        "--greeting: What is said.",
        "huginn_3_5b",
    ):
        assert words in done.stdout
    assert len(done.stdout.splitlines()) < 50


def test_full_help_lists_every_option() -> None:
    text = launch.help_text(test_full_help_lists_every_option, full=True)  # type: ignore[arg-type]
    for option in OPTIONS:
        assert f"--config.{option.path} (" in text


def test_an_environment_that_would_come_too_late_is_a_mistake_of_the_programmer() -> None:
    assert jax.__name__ in sys.modules
    with pytest.raises(RuntimeError, match="already imported"):
        launch.set_environment(build({"environment": ["A=1"]}))
    assert "A" not in os.environ
