"""What becomes of a training run when something goes wrong: kills, full disks, damaged files.

    python -m benchmarks.faults
    python -m benchmarks.faults --kills=5 --only=kill,disk
    python -m benchmarks.faults --steps=4 --every=2 --only=metrics

Trains a tiny model once without a fault, and then once per fault: the fault, the end of the
process, and the same command again, until all steps are done. Prints for every fault the exit code,
the seconds from the fault to the end of the process, its last line, and whether `metrics.jsonl`
equals that of the run without a fault, byte for byte. This command ends with exit code 1 if
anything was lost.

A full disk needs root and tmpfs, an unwritable folder root and `chattr +i`; without these they are
left out with the reason. On an idle machine all of it takes a quarter of an hour.
"""

import argparse
import dataclasses
import functools
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence

from rich.console import Console
from rich.table import Table

from megatransformer_jax.storage import tree_bytes

_TIMEOUT_S = 600
_PROGRAM = (sys.executable, "-m", "megatransformer_jax.cli.commands", "train")
# Replaces the clock of a process that has this folder on its path.
_CLOCK_BACK = "import time\n_now = time.time\ntime.time = lambda: _now() - 30 * 86400\n"


class LeftOut(Exception):
    """A fault that cannot be made here."""


@dataclasses.dataclass
class Outcome:
    """What a fault did.

    Attributes:
      fault: for people.
      codes: exit codes of the processes that met it.
      seconds: from the fault to the end of the process, the longest if there were several.
      message: the last line that a process wrote before it ended.
      tracebacks: how many it wrote.
      result: "identical", or what differs.
    """

    fault: str
    codes: list[int]
    seconds: float
    message: str
    tracebacks: int
    result: str


@dataclasses.dataclass(frozen=True)
class Settings:
    """Steps of a run, steps between saves, random kills, and where everything is."""

    steps: int
    every: int
    kills: int
    folder: pathlib.Path

    @property
    def whole(self) -> pathlib.Path:
        """The run without a fault."""
        return self.folder / "whole"

    @property
    def middle(self) -> int:
        """Step of a checkpoint in the middle."""
        return max(self.steps // 2 // self.every, 1) * self.every


class Training:
    """A run that is started again and again in one workdir.

    Args:
      settings: of all runs.
      workdir: of this one.
    """

    def __init__(self, settings: Settings, workdir: pathlib.Path):
        self.settings = settings
        self.workdir = workdir
        self._number = 0
        self.log = workdir.with_name(f"{workdir.name}.log")

    def start(self, *words: str, environment: dict[str, str] | None = None) -> subprocess.Popen:
        """Starts the command; its output goes to `log`."""
        self._number += 1
        self.log = self.workdir.with_name(f"{self.workdir.name}_{self._number}.log")
        every = self.settings.every
        options = {
            "workdir": self.workdir,
            "train.steps": self.settings.steps,
            "optimizer.warmup_steps": 1,
            "checkpoint.every_steps": every,
            "checkpoint.keep_last": 1000,
            "evaluation.every_steps": self.settings.steps,
            "evaluation.final_depths": 1,
            "samples.every_steps": 0,
            "logging.every_steps": max(every // 2, 1),
            "logging.progress": "lines",
            "compilation_cache_dir": self.settings.folder / "programs",
        }
        given = [f"--config.{name}={value}" for name, value in options.items()]
        with open(self.log, "wb") as output:
            return subprocess.Popen(
                [*_PROGRAM, "--config=recurrent:tiny", *given, *words],
                stdout=output,
                stderr=output,
                env=os.environ | {"JAX_PLATFORMS": "cpu"} | (environment or {}),
            )

    def finish(self) -> None:
        """Runs the command to its end.

        Raises:
          RuntimeError: if it fails; shows its output.
        """
        if self.start().wait(_TIMEOUT_S):
            raise RuntimeError(f"{self.workdir.name}: it does not go on:\n{self.log.read_text()}")

    def wait_for(self, process: subprocess.Popen, condition: Callable[[], bool]) -> None:
        """Waits until something has happened in the run.

        Raises:
          RuntimeError: if the process ends before; shows its output.
        """
        deadline = time.monotonic() + _TIMEOUT_S
        while not condition():
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"it ended too early:\n{self.log.read_text()}")
            time.sleep(0.002)

    def has_saved(self, step: int) -> bool:
        """Whether there is a checkpoint of this step."""
        return (self.workdir / "checkpoints" / str(step)).is_dir()

    def is_saving(self) -> bool:
        """Whether a save is going on."""
        return any((self.workdir / "checkpoints").glob("*.orbax-checkpoint-tmp*"))

    def last_line(self) -> str:
        """What the process wrote last."""
        lines = self.log.read_text(errors="replace").splitlines()
        return lines[-1] if lines else ""

    def compare(self, broken: int | None = None) -> str:
        """`identical`, or what differs from the run without a fault.

        Args:
          broken: index of a line that the fault itself has destroyed.
        """
        found, expected = (
            (folder / "metrics.jsonl").read_bytes().splitlines(keepends=True)
            for folder in (self.workdir, self.settings.whole)
        )
        if broken is not None:
            del expected[broken]
        if found == expected:
            return "identical"
        same = len(set(found) & set(expected))
        return f"{same} of {len(expected)} lines identical, {len(found) - same} others"


def _end(process: subprocess.Popen) -> tuple[int, float]:
    """Exit code, and seconds from now until the process has ended."""
    begin = time.monotonic()
    return process.wait(_TIMEOUT_S), time.monotonic() - begin


def _outcome(fault: str, run: Training, process: subprocess.Popen) -> Outcome:
    """Of a fault that has just been made."""
    code, seconds = _end(process)
    tracebacks = run.log.read_text(errors="replace").count("Traceback (most recent call last)")
    return Outcome(fault, [code], seconds, run.last_line(), tracebacks, "")


def _at_rest(settings: Settings, name: str) -> Training:
    """A copy of the whole run as it was after its checkpoint in the middle, to go on with."""
    run = Training(settings, settings.folder / name)
    shutil.copytree(settings.whole, run.workdir)
    for path in (run.workdir / "checkpoints").iterdir():
        if int(path.name) > settings.middle:
            shutil.rmtree(path)
    return run


# ------------------------------------------------------------------------------
# Processes that end.


def kills(settings: Settings) -> Outcome:
    """kill -9 at random moments: anywhere, some steps on, inside of a save."""
    run = Training(settings, settings.folder / "kills")
    rng = random.Random(0)
    inside = 0
    for number in range(settings.kills):
        process = run.start()
        try:
            if number % 3 == 0:
                time.sleep(rng.uniform(0.2, 8))
            else:
                done = max((int(p.name) for p in _checkpoints(run)), default=0)
                target = min(done + settings.every, settings.steps)
                run.wait_for(process, functools.partial(run.has_saved, target))
                if number % 3 == 2:
                    run.wait_for(process, run.is_saving)
                time.sleep(rng.uniform(0, 0.05))
        except RuntimeError:
            if process.poll() != 0:  # It may have finished all of its steps.
                raise
        inside += run.is_saving()
        process.kill()
        process.wait()
    run.finish()
    name = f"kill -9, {settings.kills} times, {inside} of them inside of a save"
    return Outcome(name, [-9], 0.0, "", 0, run.compare())


def _checkpoints(run: Training) -> list[pathlib.Path]:
    return [path for path in (run.workdir / "checkpoints").glob("*") if path.name.isdigit()]


def sigterm(settings: Settings) -> Outcome:
    """SIGTERM between two saves."""
    run = Training(settings, settings.folder / "sigterm")
    return _sigterm("SIGTERM", run, run.start(), lambda: run.has_saved(settings.every))


def sigterm_in_a_save(settings: Settings) -> Outcome:
    """SIGTERM while a checkpoint is written."""
    run = Training(settings, settings.folder / "sigterm_save")
    return _sigterm("SIGTERM inside of a save", run, run.start(), run.is_saving)


def sigterm_while_compiling(settings: Settings) -> Outcome:
    """SIGTERM before the first step; nothing that was compiled before is used."""
    run = Training(settings, settings.folder / "sigterm_compile")
    process = run.start("--config.compilation_cache_dir=None")
    # It is written just before the first step.
    is_written = (run.workdir / "config.json").is_file
    return _sigterm("SIGTERM while compiling", run, process, is_written, 3)


def _sigterm(
    name: str,
    run: Training,
    process: subprocess.Popen,
    is_time: Callable[[], bool],
    seconds: float = 0,
) -> Outcome:
    """SIGTERM so many seconds after it is time, and the run to its end."""
    run.wait_for(process, is_time)
    time.sleep(seconds)
    process.send_signal(signal.SIGTERM)
    outcome = _outcome(name, run, process)
    run.finish()
    return dataclasses.replace(outcome, result=run.compare())


def two_runs(settings: Settings) -> Outcome:
    """A second run in the workdir of one that is stopped in the middle."""
    run = Training(settings, settings.folder / "two")
    first = run.start()
    run.wait_for(first, lambda: run.has_saved(settings.every))
    first.send_signal(signal.SIGSTOP)
    second = run.start()
    outcome = _outcome("two runs in one workdir", run, second)
    first.send_signal(signal.SIGCONT)
    first.wait(_TIMEOUT_S)
    return dataclasses.replace(outcome, result=run.compare())


# ------------------------------------------------------------------------------
# Storage that fails.


def disk_full(settings: Settings) -> Outcome:
    """A disk that is full in the middle of a save, and is then made larger."""
    run = Training(settings, settings.folder / "full")
    run.workdir.mkdir()
    # Room for one checkpoint and a half.
    size = tree_bytes(settings.whole)
    saved = settings.whole / "checkpoints" / str(settings.every)
    one = tree_bytes(saved)
    _try("mount", "-t", "tmpfs", "-o", f"size={3 * one // 2 + 200_000}", "tmpfs", str(run.workdir))
    process = run.start()
    try:
        run.wait_for(process, lambda: run.has_saved(settings.every))
        outcome = _outcome("disk full in a save", run, process)
        _try("mount", "-o", f"remount,size={4 * size}", str(run.workdir))
        run.finish()
        return dataclasses.replace(outcome, result=run.compare())
    finally:
        process.kill()
        process.wait()
        subprocess.run(["umount", str(run.workdir)], check=False)


def unwritable(settings: Settings) -> Outcome:
    """A folder of checkpoints that loses its permission to write."""
    run = Training(settings, settings.folder / "unwritable")
    process = run.start()
    run.wait_for(process, lambda: run.has_saved(settings.every))
    folder = str(run.workdir / "checkpoints")
    try:
        _try("chattr", "+i", folder)
    except LeftOut:
        process.kill()
        process.wait()
        raise
    outcome = _outcome("checkpoints unwritable in mid-run", run, process)
    _try("chattr", "-i", folder)
    run.finish()
    return dataclasses.replace(outcome, result=run.compare())


def folder_replaced(settings: Settings) -> Outcome:
    """The folder of checkpoints moved away, and a file in its place."""
    run = Training(settings, settings.folder / "replaced")
    process = run.start()
    run.wait_for(process, lambda: run.has_saved(settings.every))
    folder = run.workdir / "checkpoints"
    folder.rename(run.workdir / "away")
    folder.write_text("")
    outcome = _outcome("folder of checkpoints replaced by a file", run, process)
    folder.unlink()
    (run.workdir / "away").rename(folder)
    run.finish()
    return dataclasses.replace(outcome, result=run.compare())


def _try(*words: str) -> None:
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        raise LeftOut(done.stderr.strip() or f"{words[0]} failed")


# ------------------------------------------------------------------------------
# Files that are damaged.


def files_cut(settings: Settings) -> list[Outcome]:
    """Cuts one file of each kind in the newest checkpoint to half its size, each in its own run."""
    newest = settings.whole / "checkpoints" / str(settings.middle)
    kinds: dict[str, pathlib.Path] = {}
    for path in sorted(newest.rglob("*"), key=lambda path: path.is_file() and path.stat().st_size):
        if path.is_file():
            kind = "arrays" if path.parent.name == "d" else str(path.relative_to(newest))
            kinds[kind] = path
    outcomes = []
    for number, (kind, path) in enumerate(sorted(kinds.items())):
        run = _at_rest(settings, f"cut_{number}")
        place = run.workdir / path.relative_to(settings.whole)
        os.truncate(place, place.stat().st_size // 2)
        process = run.start()
        outcome = _outcome(f"checkpoint cut: {kind}", run, process)
        if outcome.codes[0]:
            shutil.rmtree(run.workdir / "checkpoints" / str(settings.middle))  # As the line says.
            run.finish()
        outcomes.append(dataclasses.replace(outcome, result=run.compare()))
    return outcomes


def config_cut(settings: Settings) -> Outcome:
    """A config.json of which half is there."""
    run = _at_rest(settings, "config")
    path = run.workdir / "config.json"
    os.truncate(path, path.stat().st_size // 2)
    outcome = _outcome("config.json cut", run, run.start())
    return dataclasses.replace(outcome, result=run.compare())


def metrics_torn(settings: Settings) -> Outcome:
    """A last line of metrics without its end."""
    run = _at_rest(settings, "torn")
    path = run.workdir / "metrics.jsonl"
    os.truncate(path, path.stat().st_size - 20)
    outcome = _outcome("metrics: last line torn", run, run.start())
    return dataclasses.replace(outcome, result=run.compare())


def metrics_broken(settings: Settings) -> Outcome:
    """A line in the middle of the metrics that cannot be read."""
    run = _at_rest(settings, "broken")
    path = run.workdir / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*lines[:1], lines[1][:9] + "\n", *lines[2:]]))
    outcome = _outcome("metrics: line 2 broken", run, run.start())
    kept = (run.workdir / "metrics.jsonl.damaged").is_file()
    note = "" if kept else "; NO copy of the file as it was"
    result = f"{run.compare(broken=1)} but for the broken line{note}"
    return dataclasses.replace(outcome, result=result)


def clock_back(settings: Settings) -> Outcome:
    """The clock set back by 30 days between two starts; how TensorBoard reads the result."""
    from tensorboard.backend.event_processing.event_accumulator import (  # noqa: PLC0415
        EventAccumulator,
    )

    run = _at_rest(settings, "clock")
    module = settings.folder / "clock_back"
    module.mkdir()
    (module / "sitecustomize.py").write_text(_CLOCK_BACK)
    paths = os.pathsep.join([str(module), os.environ.get("PYTHONPATH", "")])
    process = run.start(environment={"PYTHONPATH": paths})
    outcome = _outcome("clock 30 days back", run, process)
    events = EventAccumulator(str(run.workdir / "events"), size_guidance={"scalars": 0})
    events.Reload()
    steps = [point.step for point in events.Scalars("train/loss")]
    is_ordered = steps == sorted(set(steps))
    order = "in order" if is_ordered else "NOT in order"
    return dataclasses.replace(outcome, result=f"{run.compare()}; TensorBoard {order}")


# ------------------------------------------------------------------------------
# The table.

FAULTS: dict[str, Callable[[Settings], Outcome | list[Outcome]]] = {
    "kill": kills,
    "sigterm": sigterm,
    "sigterm-save": sigterm_in_a_save,
    "sigterm-compile": sigterm_while_compiling,
    "two": two_runs,
    "disk": disk_full,
    "unwritable": unwritable,
    "replaced": folder_replaced,
    "cut": files_cut,
    "config": config_cut,
    "torn": metrics_torn,
    "metrics": metrics_broken,
    "clock": clock_back,
}


def carry_out(settings: Settings, names: Sequence[str], console: Console) -> list[Outcome]:
    """The outcomes of the named faults, after the run without one."""
    Training(settings, settings.whole).finish()
    outcomes: list[Outcome] = []
    for name in names:
        try:
            found = FAULTS[name](settings)
        except LeftOut as reason:
            console.print(f"{name}: left out ({reason})", markup=False)
            continue
        outcomes += found if isinstance(found, list) else [found]
        console.print(f"{name}: done", markup=False)
    return outcomes


def table_of(outcomes: Sequence[Outcome]) -> Table:
    """A line per fault."""
    table = Table(title="Faults", show_lines=True)
    names = ("fault", "exit code", "seconds", "tracebacks", "last line", "metrics after all steps")
    for name in names:
        table.add_column(name, overflow="fold")
    for one in outcomes:
        codes = ", ".join(map(str, one.codes))
        numbers = (codes, f"{one.seconds:.1f}", str(one.tracebacks))
        table.add_row(one.fault, *numbers, one.message, one.result)
    return table


def main(words: Sequence[str] | None = None) -> None:
    """Carries the faults out and prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=100, help="of every run")
    parser.add_argument("--every", type=int, default=10, help="steps between two saves")
    parser.add_argument("--kills", type=int, default=20, help="at random moments")
    parser.add_argument("--only", default="", help=f"by commas: {', '.join(FAULTS)}")
    given = parser.parse_args(words)
    names = [name for name in given.only.split(",") if name] or list(FAULTS)
    if unknown := sorted(set(names) - set(FAULTS)):
        parser.error(f"--only={unknown[0]}: known are {', '.join(FAULTS)}")
    if given.steps < 2 * given.every:
        parser.error(f"--steps={given.steps}: give at least two saves, {2 * given.every}")
    console = Console(width=None if sys.stdout.isatty() else 200)
    with tempfile.TemporaryDirectory() as folder:
        settings = Settings(given.steps, given.every, given.kills, pathlib.Path(folder))
        outcomes = carry_out(settings, names, console)
    console.print(table_of(outcomes))
    lost = [
        one.fault
        for one in outcomes
        if not one.result.startswith("identical") or "NO" in one.result or one.tracebacks
    ]
    if lost:
        sys.exit(f"lost something, or was not clear: {', '.join(lost)}")


if __name__ == "__main__":
    main()
