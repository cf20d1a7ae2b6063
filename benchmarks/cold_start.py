"""Time from a command to its first result, in fresh processes, without compiled programs and with.

    python -m benchmarks.cold_start --model=runs/recurrent
    python -m benchmarks.cold_start --model=runs/recurrent --rounds=3 --only=generate,train

Every round begins with an empty folder for compiled programs. "first" is the first process that
uses it, "second" the next one; "no cache" keeps nothing. A process is ended once it has shown its
first result: text, a table, or the metrics of the first step. Run it on an idle machine; on a busy
one only the seconds of CPU time compare.
"""

import argparse
import dataclasses
import os
import pathlib
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

_COMMAND = (sys.executable, "-m", "megatransformer_jax.cli.commands")
_COLUMNS = ("no cache", "first", "second")
# No result takes this long on a machine that is worth a measurement.
_TIMEOUT_S = 600


@dataclasses.dataclass(frozen=True)
class Case:
    """Something that a user waits for.

    Attributes:
      name: for people.
      words: of the process.
      shows: what its output has once the first result is there.
    """

    name: str
    words: tuple[str, ...]
    shows: str


class Seconds(NamedTuple):
    """Until a result is there: by the clock, and of the CPU in all threads."""

    clock: float
    cpu: float


def make_cases(model: pathlib.Path, folder: pathlib.Path) -> list[Case]:
    """What is measured.

    Args:
      model: workdir of a run on text.
      folder: for what the commands write; exists.
    """
    first_token = (
        "import megatransformer_jax as mt; "
        f"print('token', next(mt.load({str(model)!r}).stream('The ', strategy='greedy')).token_id)"
    )
    return [
        Case("megatransformer --help", (*_COMMAND, "--help"), "lists the options"),
        Case("import jax", (sys.executable, "-c", "import jax; print('done')"), "done"),
        Case(
            "mt.load, first token of stream",
            (sys.executable, "-c", first_token),
            "token",
        ),
        Case(
            "generate 32 tokens",
            (*_COMMAND, "generate", f"--model={model}", "--prompt=The ", "--max_new_tokens=32"),
            "tokens in",
        ),
        Case(
            "evaluate one batch at 2 depths",
            (
                *(*_COMMAND, "evaluate", f"--model={model}", "--depths=1,8", "--num_batches=1"),
                f"--output={folder / 'evaluation'}",
            ),
            "depth_table.png",
        ),
        Case(
            "train, first step",
            (
                *(*_COMMAND, "train", f"--config={model / 'config.json'}"),
                *("--config.logging.every_steps=1", "--config.logging.writers=()"),
                f"--config.workdir={folder / 'run'}",
            ),
            "step 1/",
        ),
    ]


def seconds_until_shown(case: Case, cache: pathlib.Path | None) -> Seconds:
    """Seconds from the start of a process until its output has the first result.

    Args:
      case: what is started.
      cache: folder for compiled programs. None: they are not kept.

    Raises:
      RuntimeError: if the process ends without it; shows its output.
    """
    environment = os.environ | {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1"}
    if cache is None:
        environment["JAX_ENABLE_COMPILATION_CACHE"] = "false"
    else:
        environment["JAX_COMPILATION_CACHE_DIR"] = str(cache)
    cpu, start = _cpu_of_children(), time.perf_counter()
    process = subprocess.Popen(
        case.words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert process.stdout is not None
    lines: list[str] = []
    try:
        for line in process.stdout:
            lines.append(line)
            if case.shows in line:
                clock = time.perf_counter() - start
                break
        else:
            raise RuntimeError(f"{case.name}: ended without {case.shows!r}:\n{''.join(lines)}")
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
        process.wait(_TIMEOUT_S)
    return Seconds(clock, _cpu_of_children() - cpu)


def _cpu_of_children() -> float:
    """Of processes that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def measure(case: Case, rounds: int) -> list[list[Seconds]]:
    """Seconds of each column, by round."""
    columns: list[list[Seconds]] = [[] for _ in _COLUMNS]
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as cache:
            for column, folder in zip(columns, (None, cache, cache), strict=True):
                path = None if folder is None else pathlib.Path(folder)
                column.append(seconds_until_shown(case, path))
    return columns


def table_of(results: dict[str, list[list[Seconds]]]) -> Table:
    """Medians in seconds, with the range over the rounds."""
    title = "Seconds until the first result: median (smallest to largest), median of CPU time"
    table = Table(title=title)
    table.add_column("case")
    for name in _COLUMNS:
        table.add_column(name, justify="right")
    for name, columns in results.items():
        cells = []
        for column in columns:
            clock, cpu = zip(*column, strict=True)
            middle = f"{statistics.median(clock):.1f} ({min(clock):.1f} to {max(clock):.1f})"
            cells.append(f"{middle}, CPU {statistics.median(cpu):.1f}")
        table.add_row(name, *cells)
    return table


def main(words: Sequence[str] | None = None) -> None:
    """Measures and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, type=pathlib.Path, help="workdir of a text run")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--only", default="", help="words of the names of cases, by commas")
    given = parser.parse_args(words)
    with tempfile.TemporaryDirectory() as folder:
        cases = make_cases(given.model.absolute(), pathlib.Path(folder))
        wanted = [word for word in given.only.split(",") if word]
        chosen = [c for c in cases if not wanted or any(word in c.name for word in wanted)]
        results = {}
        for case in chosen:
            # Training goes on in a workdir that has a checkpoint; here it never gets to one.
            results[case.name] = measure(case, given.rounds)
    Console().print(table_of(results))


if __name__ == "__main__":
    main()
