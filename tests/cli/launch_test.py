"""What every command shares: environment, log, errors in one line, help; JAX imported late."""

import dataclasses
import os
import pathlib
import re
import subprocess
import sys

import jax
import pytest

from megatransformer_jax.cli import launch
from megatransformer_jax.cli.commands import COMMANDS, SUMMARIES, find_command, main
from megatransformer_jax.cli.flags import Command, help_page
from megatransformer_jax.config.build import build
from megatransformer_jax.config.option import ConfigError, UserError
from megatransformer_jax.extras import import_function

PROGRAM = '''"""Shows what a command sees."""
import dataclasses, os, signal, sys
from absl import logging
from megatransformer_jax.cli.flags import Command
from megatransformer_jax.cli.launch import run_command
from megatransformer_jax.config.option import UserError, option
from megatransformer_jax.failures import SaveFailed

@dataclasses.dataclass(frozen=True)
class Options:
    greeting: str = option("hello", "What is said.")

def show(parsed):
    assert "jax" not in sys.modules
    logging.info("an info message")
    if parsed.options.greeting == "interrupt":
        signal.signal(signal.SIGINT, signal.default_int_handler)  # xdist ignores it in children.
        os.kill(os.getpid(), signal.SIGINT)
        signal.pause()
    if parsed.options.greeting == "fail":
        raise UserError("corpus.txt: is empty; name another file.")
    if parsed.options.greeting == "fail later":
        raise SaveFailed("the bucket does not answer.")
    if parsed.options.greeting == "disk full":
        raise OSError(28, "No space left on device", "out.txt")
    print(parsed.options.greeting, parsed.config.model.width, os.environ.get("GIVEN"))

COMMAND = Command("show", "Shows what a command sees.", Options, show, takes_run=True)
run_command(COMMAND, sys.argv[1:])
'''


@dataclasses.dataclass(frozen=True)
class Nothing:
    """A command without options."""


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    path = tmp_path_factory.mktemp("program") / "show.py"
    path.write_text(PROGRAM)
    return path


def run_program(program: pathlib.Path, *words: str) -> subprocess.CompletedProcess[str]:
    root = pathlib.Path(launch.__file__).parents[2]
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


def test_functions_of_the_current_folder_can_be_named(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A console script has its own folder on the path, not the one that it is started in."""
    name = "functions_of_the_reader"
    (tmp_path / f"{name}.py").write_text("def double(x):\n    return 2 * x\n")
    monkeypatch.chdir(tmp_path)
    before = [folder for folder in sys.path if folder]
    monkeypatch.setattr(sys, "path", list(before))
    found = []
    command = Command(
        "show", "x", Nothing, lambda _: found.append(import_function("x", f"{name}:double")(4))
    )
    launch.run_command(command, [])
    sys.modules.pop(name)
    assert found == [8] and sys.path == before


def test_ctrl_c_is_one_line(program: pathlib.Path) -> None:
    done = run_program(
        program, "--config.preset=tiny", "--greeting=interrupt", "--config.logging.level=error"
    )
    assert done.returncode == 130
    assert done.stderr == "interrupted.\n"


@pytest.mark.parametrize(
    ("greeting", "problem"),
    [
        ("fail later", "the bucket does not answer."),
        ("disk full", "out.txt: No space left on device; make room, then start the same command"),
    ],
)
def test_what_may_succeed_later_has_its_own_exit_code(
    program: pathlib.Path, greeting: str, problem: str
) -> None:
    done = run_program(program, "--config.preset=tiny", f"--greeting={greeting}")
    assert done.returncode == 3
    assert f"error: {problem}" in done.stderr and "Traceback" not in done.stderr


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
        (["--config=recurent"], "did you mean 'recurrent'"),
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
        "Usage: megatransformer show [--option=VALUE ...]",
        "Shows what a command sees.",
        "--config=recurrent:tiny",
        "--config.model.recurrence.mean_steps=16",
        "docs/options.md",
        "--greeting (str)\n      What is said.\n      Default: 'hello'",
        "huginn_3_5b",
    ):
        assert words in done.stdout
    assert len(done.stdout.splitlines()) < 55


def test_an_environment_that_would_come_too_late_is_an_error() -> None:
    assert jax.__name__ in sys.modules
    with pytest.raises(ConfigError, match="already imported"):
        launch.set_environment(build({"environment": ["A=1"]}))
    assert "A" not in os.environ


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    main(name, ["--help"])
    text = capsys.readouterr().out
    assert text.startswith(f"Usage: megatransformer {name}")
    command = find_command(name)
    assert text == help_page(command) + "\n"
    for option in command.known:
        assert f"\n  --{option} (" in text or option == "config"
    assert all(f"  megatransformer {name} " in text for _ in command.examples)


def test_the_overview_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    for words in ([], ["--help"]):
        main(None, words)
        text = capsys.readouterr().out
        assert all(f"  {name} " in text and line in text for name, line in SUMMARIES.items())
    main(None, ["--version"])
    assert re.fullmatch(r"megatransformer \d+\.\d+\.\d+\n", capsys.readouterr().out)


def test_an_unknown_command_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(None, ["find_lrs"])
    assert caught.value.code == 2
    assert "'find_lrs' is not a command; did you mean find-lr?" in capsys.readouterr().err
    with pytest.raises(UserError, match="commands are train, generate"):
        find_command("x")


@pytest.mark.parametrize(
    "words",
    [
        ["-m", "experiments.inspect"],
        ["-m", "experiments.find_lr"],
        ["experiments/train.py"],
        ["-m", "megatransformer_jax.cli.commands"],
    ],
    ids=" ".join,
)
def test_commands_are_modules_and_scripts_too(words: list[str], repository: pathlib.Path) -> None:
    done = subprocess.run(
        [sys.executable, *words, "--help"],
        cwd=repository,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.startswith("Usage: megatransformer ")
