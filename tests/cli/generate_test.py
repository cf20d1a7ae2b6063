"""The command as a program: help, bad input and Ctrl-C in one line each, JAX imported late."""

import os
import pathlib
import subprocess
import sys

import pytest

from megatransformer_jax.cli import generate
from megatransformer_jax.cli.commands import main as command

# Runs the command with stand-ins for what loads the model and continues prompts.
PROGRAM = """
import sys, types
screen = types.ModuleType("megatransformer_jax.cli.screen")
def continue_texts(loaded, parsed, prompts):
    assert "jax" not in sys.modules
    from absl import logging
    logging.info("loaded")
    print(parsed.generation.depth.depth, list(prompts))
    if loaded == "interrupt":
        raise KeyboardInterrupt
    for _ in range(20000 if loaded == "long" else 0):
        print("text", flush=True)
screen.continue_texts = continue_texts
sys.modules[screen.__name__] = screen
from megatransformer_jax.cli import generate
generate.load_chosen_model = lambda options: options.model
generate._check_fits = lambda *_: None
from megatransformer_jax.cli.commands import main
main("generate", sys.argv[1:])
"""


def run_program(*words: str) -> subprocess.CompletedProcess[str]:
    root = pathlib.Path(generate.__file__).parents[2]
    return subprocess.run(
        [sys.executable, "-c", PROGRAM, *words],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(root)},
        check=False,
    )


def test_the_command_line_is_read_before_jax() -> None:
    done = run_program("--model=a", "--prompt=b", "--depth=3")
    assert (done.returncode, done.stdout) == (0, "3 ['b']\n"), done.stderr
    assert done.stderr.endswith(" loaded\n")


def test_ctrl_c_is_one_line() -> None:
    done = run_program("--model=interrupt", "--prompt=b")
    assert (done.returncode, done.stdout) == (130, "None ['b']\n")
    assert done.stderr.endswith("\ninterrupted.\n")
    assert "Traceback" not in done.stderr


def test_a_reader_that_has_enough_is_no_error() -> None:
    root = pathlib.Path(generate.__file__).parents[2]
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM, "--model=long", "--prompt=b"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(root)},
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        error = process.stderr.read()
        assert process.wait() == generate.BROKEN_PIPE
    assert b"Traceback" not in error


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["--prompt=a"], "error: --model: is missing"),
        (["--model=a", "--prompts_file=absent.txt"], "error: --prompts_file=absent.txt: cannot"),
        (["--model=a", "--prompt=a", "--dept=3"], "error: --dept: no such option; did you mean"),
    ],
)
def test_bad_input_is_one_line(
    words: list[str], problem: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        command("generate", [*words])
    assert caught.value.code == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith(problem)
    assert shown.err.count("\n") == 1


@pytest.mark.parametrize("word", ["--help", "-h", "--helpfull"])
def test_help_begins_with_what_it_does(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    command("generate", [word])
    text = capsys.readouterr().out
    assert text.startswith(
        "Usage: megatransformer generate [--option=VALUE ...]\n\nContinues prompts"
    )
    assert "\n  --depth (int or None)\n" in text
