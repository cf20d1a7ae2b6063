"""The command as a program: help, bad input and Ctrl-C in one line each, JAX imported late."""

import os
import pathlib
import subprocess
import sys

import pytest

from experiments import generate

# Runs the command with a stand-in for what loads the model.
PROGRAM = """
import sys, types
module = types.ModuleType("experiments.run_generation")
def run(command, prompts):
    assert "jax" not in sys.modules
    from absl import logging
    logging.info("loaded")
    print(command.config.depth.depth, list(prompts))
    if command.options.workdir == "interrupt":
        raise KeyboardInterrupt
    for _ in range(20000 if command.options.workdir == "long" else 0):
        print("text", flush=True)
module.run = run
sys.modules[module.__name__] = module
from experiments import generate
generate.main(["generate", *sys.argv[1:]])
"""


def run_program(*words: str) -> subprocess.CompletedProcess[str]:
    root = pathlib.Path(generate.__file__).parent.parent
    return subprocess.run(
        [sys.executable, "-c", PROGRAM, *words],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(root)},
        check=False,
    )


def test_the_command_line_is_read_before_jax() -> None:
    done = run_program("--workdir=a", "--prompt=b", "--depth=3")
    assert (done.returncode, done.stdout) == (0, "3 ['b']\n"), done.stderr
    assert done.stderr.endswith(" loaded\n")


def test_ctrl_c_is_one_line() -> None:
    done = run_program("--workdir=interrupt", "--prompt=b")
    assert (done.returncode, done.stdout) == (130, "None ['b']\n")
    assert done.stderr.endswith("\ninterrupted.\n")
    assert "Traceback" not in done.stderr


def test_a_reader_that_has_enough_is_no_error() -> None:
    root = pathlib.Path(generate.__file__).parent.parent
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM, "--workdir=long", "--prompt=b"],
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
        (["--prompt=a"], "error: --workdir: is missing"),
        (["--workdir=a", "--prompts_file=absent.txt"], "error: --prompts_file=absent.txt: cannot"),
        (["--workdir=a", "--prompt=a", "--dept=3"], "error: --dept: no such option; did you mean"),
    ],
)
def test_bad_input_is_one_line(
    words: list[str], problem: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        generate.main(["generate", *words])
    assert caught.value.code == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith(problem)
    assert shown.err.count("\n") == 1


@pytest.mark.parametrize("word", ["--help", "-h", "--helpfull"])
def test_help_begins_with_what_it_does(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    generate.main(["generate", word])
    text = capsys.readouterr().out
    assert text.startswith("Continues prompts with a trained model")
    assert "\n  --depth (int or None)\n" in text


def test_the_entry_point_is_short() -> None:
    assert len(pathlib.Path(generate.__file__).read_text().splitlines()) <= 80
