"""Every benchmark runs at its smallest and prints its result; documented options are there."""

import argparse
import pathlib
import re
import runpy
import shlex
import sys
from collections.abc import Callable
from typing import Any, NoReturn

import pytest
from markdown_pages import pages

from megatransformer_jax.config.build import configure, merge
from megatransformer_jax.runs.train import train

pytestmark = pytest.mark.slow

SHORT = {"train": {"steps": 3}, "optimizer": {"warmup_steps": 1}, "checkpoint": {"every_steps": 3}}


def begun(experiment: str, folder: pathlib.Path) -> pathlib.Path:
    """A run that has hardly begun."""
    changes = {"workdir": str(folder), "evaluation": {"final_depths": (1,), "num_batches": 1}}
    train(configure(experiment, merge(SHORT, changes)))
    return folder


@pytest.fixture(scope="module")
def text_run(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return begun("recurrent:tiny", tmp_path_factory.mktemp("text") / "run")


@pytest.fixture(scope="module")
def reasoning_run(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return begun("reasoning:tiny", tmp_path_factory.mktemp("reasoning") / "run")


@pytest.fixture
def run(
    repository: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """Runs a benchmark as a command; returns what it printed."""

    monkeypatch.syspath_prepend(repository)

    def run_module(name: str, *words: str) -> str:
        monkeypatch.setattr(sys, "argv", [name, *words])
        runpy.run_module(f"benchmarks.{name}", run_name="__main__")
        return capsys.readouterr().out

    return run_module


@pytest.mark.parametrize(
    ("name", "words", "shown"),
    [
        (
            "train_step",
            "--batch=1 --length=16 --steps-without-gradient=1 --steps-with-gradient=1 --rounds=1",
            r"ratio +\d",
        ),
        (
            "generate",
            "--prompt=8 --new=4 --depth=1 --capacities 64 --rounds=1",
            r"times a cached token",
        ),
        (
            "exported",
            "--width=16 --rows 1 --depths 1 --capacity=64 --rounds=1",
            r"\| 1 \| 1 \| [\d.]+ ms",
        ),
        (
            "quantization",
            "--width=64 --rows=2 --prompt=4 --new=2 --depth=1 --rounds=1",
            r"\| int4 x int8, groups of 64 \| [\d.]+ ms",
        ),
        (
            "streaming",
            "--preset=tiny --prompt=4 --new=4 --calls=2 --rounds=1",
            r"\| stream, default \| \d+ \|",
        ),
        (
            "peer",
            "--experts=16 --heads=1 --top-k=1 --width=8 --batch=1 --length=8 --rounds=1",
            r"PEER / dense: \d",
        ),
        (
            "gpu",
            "--platform=cpu --preset=tiny --batch=2 --length=16 --prompt=8 --new=4 --rows=1 "
            "--rounds=1",
            r"causal +xla: right: output [\s\S]+ train step +[\s\S]+ of the bound; first call",
        ),
        ("faults", "--steps=4 --every=2 --only=metrics", r"line 2 broken[\s\S]+identical but for"),
        (
            "prepared",
            "--mb=1 --workers=1 --vocabulary=512 --seconds=0.01 --no-kill",
            r"MB/s[\s\S]+\| 64 \| 1 \| [\d.]+ ms \| [\d.]+ ms \|",
        ),
        (
            "learning_rates",
            "parcae:tiny --rates 0.004 0.008 --steps=3",
            r"\| 0\.004 \| [\d.]+ \|[\s\S]+\| parcae:tiny \| 0 \| [\d.]+ to [\d.]+ \| >= \d",
        ),
        (
            "serving",
            "--width=16 --rows=2 --texts=6 --new=8 --slots=2 --rounds=1 --long-prompt=0",
            r"\| mixed \| \d+ \| [\d.]+ \(",
        ),
    ],
)
def test_without_a_run(run: Callable[..., str], name: str, words: str, shown: str) -> None:
    assert re.search(shown, run(name, *words.split()))


@pytest.mark.parametrize(
    ("name", "words", "shown"),
    [
        ("int8_weights", "--depths 1 --batches=1", r"\| 1 \| [\d,]+ \| [\d.]+ \| [\d.]+ \|"),
        (
            "strategies",
            "--prompts=1 --prompt-length=8 --new=4 --only=greedy --rounds=1",
            r"\| greedy \|",
        ),
        ("cold_start", "--only=help", r"megatransformer"),
        (
            "serving_soak",
            "--minutes=0.05 --rate=4 --rows=2 --capacity=64 --max-new=8 --prompt-words=4",
            r"0 refused \(429\), 0 errors",
        ),
    ],
)
def test_of_a_text_run(
    run: Callable[..., str], text_run: pathlib.Path, name: str, words: str, shown: str
) -> None:
    option = "--workdir" if name in ("int8_weights", "strategies") else "--model"
    assert re.search(shown, run(name, f"{option}={text_run}", *words.split()))


def test_of_two_text_runs(run: Callable[..., str], text_run: pathlib.Path) -> None:
    shown = run("ramp", str(text_run), str(text_run), "--rounds=1", "--window=2")
    assert re.search(r"\| run, 4 loops \| [\d.]+ ms[\s\S]+\| run \| 3 \| \d+ \| [\d.]+ \|", shown)


def test_of_a_reasoning_run(run: Callable[..., str], reasoning_run: pathlib.Path) -> None:
    few = ("--problems=16", "--depth=2", "--sections", "fixed")
    assert run("reasoning_depth", f"--workdir={reasoning_run}", *few).count("|") > 8
    shown = run("stability", str(reasoning_run), "--times", "1", "--rows=1", "--products=2")
    assert shown.count("|") > 8
    few = ("--terms", "1", "--depth=2", "--rows=1", "--rounds=1")
    shown = run("implicit_gradient", str(reasoning_run), *few)
    assert re.search(r"\| implicit \| 1 \| [\d.-]+ \| [\d.]+ \| [\d.]+ MiB \| \d+ ms \|", shown)


def test_without_a_gpu_the_benchmark_of_one_says_so(
    run: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        run("gpu")
    assert ended.value.code == 2
    assert "--platform=gpu: JAX found 'cpu' devices only" in capsys.readouterr().err


class Parsed(Exception):
    """A benchmark has read its command line."""


def test_documented_commands_are_accepted(
    repository: pathlib.Path, run: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every `python -m benchmarks.NAME` in the documentation and in the benchmarks themselves."""
    original = argparse.ArgumentParser.parse_args

    def parse_args(self: argparse.ArgumentParser, *given: Any) -> NoReturn:
        original(self, *given)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
    seen = set()
    written = [*pages(repository), repository / "benchmarks" / "README.md"]
    for page in [*written, *(repository / "benchmarks").glob("*.py")]:
        for line in page.read_text().replace("\\\n", " ").splitlines():
            for name, rest in re.findall(r"python -m benchmarks\.(\w+)([^`|>]*)", line):
                # A mere name in a sentence may leave out what is required.
                if rest.strip() or line.startswith("    "):
                    with pytest.raises(Parsed):
                        run(name, *shlex.split(rest, comments=True))
                    seen.add(name)
    assert {"train_step", "generate", "strategies", "peer", "cold_start", "stability"} <= seen


@pytest.mark.parametrize(
    ("word", "message"),
    [("--new=0", "--new: 0 is not allowed; at least 1"), ("--json=no/such/file", "does not exist")],
)
def test_the_benchmark_of_a_gpu_checks_its_options_first(
    run: Callable[..., str], capsys: pytest.CaptureFixture[str], word: str, message: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        run("gpu", "--platform=cpu", word)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
