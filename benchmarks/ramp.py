"""Loss against time of runs whose loop counts grow: the step at each stage timed, metrics read.

    python -m benchmarks.ramp runs/curriculum_fixed runs/curriculum --plot=curriculum.png

Prints the time of a step for each loop count of each run: medians of rounds in which all stages of
all runs take turns, so that they meet the same load. From these and the runs' `metrics.jsonl`
follow loss against time, without compilation, and what the runs would have needed on an idle
machine of the same speed. Validation losses by depth are those of the runs' `depth_table.json`.
"""

import argparse
import dataclasses
import functools
import json
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from benchmarks.timing import Phase, alternate, call_first, environment, spread
from megatransformer_jax.api import read_metrics
from megatransformer_jax.config.build import load_config
from megatransformer_jax.config.option import UserError
from megatransformer_jax.config.run import RunConfig
from megatransformer_jax.evaluation.report import new_figure
from megatransformer_jax.models.core import mean_at_step
from megatransformer_jax.models.megatransformer import build_model
from megatransformer_jax.sharding.rules import Sharder
from megatransformer_jax.training.optimizers import build_optimizer
from megatransformer_jax.training.state import init_state
from megatransformer_jax.training.step import make_train_step
from megatransformer_jax.types import Batch, DTypePolicy


@dataclasses.dataclass(frozen=True)
class Run:
    """A finished run: its loop count and loss in each step, and its validation losses by depth."""

    name: str
    config: RunConfig
    loops: list[float]
    losses: list[float]
    validation: dict[int, float]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("workdirs", nargs="+", type=pathlib.Path, help="of finished runs")
    parser.add_argument("--rounds", type=int, default=15, help="timed rounds")
    parser.add_argument("--window", type=int, default=20, help="steps whose mean loss is drawn")
    parser.add_argument("--plot", type=pathlib.Path, help="PNG of loss against time")
    parser.add_argument("--json", type=pathlib.Path, help="also write all numbers to this file")
    return parser.parse_args()


def read_run(workdir: pathlib.Path) -> Run:
    """What a run has written.

    Raises:
      UserError: if it has not finished, or has no core.
    """
    config, table = load_config(workdir / "config.json"), workdir / "depth_table.json"
    if not table.exists() or not config.model.is_recurrent:
        raise UserError(f"{workdir} is not a finished run of a recurrent model: no {table.name}.")
    rows = json.loads(table.read_text("utf-8"))["rows"]
    metrics = read_metrics(workdir)
    return Run(
        name=workdir.name,
        config=config,
        loops=[float(mean_at_step(config.model.recurrence, step)) for step in range(len(metrics))],
        losses=[row["loss"] for row in metrics],
        validation={row["depth"]: row["loss"] for row in rows},
    )


def phases_of(run: Run) -> dict[float, Phase]:
    """The step of a run at its first step of each loop count, by that count."""
    config = run.config
    model = build_model(config.model, DTypePolicy(), Sharder(), "cpu")
    optimizer = build_optimizer(config.optimizer, config.train.steps)
    state = jax.jit(lambda key: init_state(model, optimizer, key))(jax.random.key(0))
    step = jax.jit(make_train_step(model, optimizer, config))
    shape = (config.data.batch_size, config.data.sequence_length)
    tokens = np.random.default_rng(0).integers(0, config.model.vocab_size, shape, dtype=np.int32)
    positions = np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape)
    mask = np.ones(shape, np.float32)
    batch = Batch(tokens, np.roll(tokens, -1, 1), mask, np.ones_like(tokens), positions)

    def prepare(number: int) -> Any:
        return state.replace(step=state.step + number), batch

    return {
        loops: Phase(
            f"{run.name}, {loops:g} loops",
            functools.partial(prepare, run.loops.index(loops)),
            lambda given: step(*given),
        )
        for loops in dict.fromkeys(run.loops)
    }


def smoothed(losses: Sequence[float], window: int) -> np.ndarray:
    """Means of the last `window` losses, from where there are so many."""
    return np.convolve(losses, np.ones(window) / window, "valid")


def plot(runs: Sequence[Run], times: Sequence[np.ndarray], window: int, path: pathlib.Path) -> None:
    figure = new_figure(6, 4)
    axes = figure.subplots()
    for run, seconds in zip(runs, times, strict=True):
        axes.plot(seconds[window - 1 :], smoothed(run.losses, window), label=run.name)
    axes.set_xlabel("seconds of training")
    axes.set_ylabel(f"training loss (nats, mean of {window} steps)")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=90)


def main() -> None:
    arguments = parse_arguments()
    try:
        runs = [read_run(workdir) for workdir in arguments.workdirs]
    except UserError as error:
        sys.exit(f"error: {error}")
    phases = [phases_of(run) for run in runs]
    every = [phase for by_loops in phases for phase in by_loops.values()]
    for phase in every:
        call_first(phase)
    alternate(every, arguments.rounds)
    facts = environment()
    print("\n".join(f"{name}: {value}" for name, value in facts.items()))
    print("\n| step | time |\n|---|---:|")
    for phase in every:
        print(f"| {phase.name} | {spread(phase.seconds)} |")
    times = [
        np.cumsum([by_loops[loops].median_s for loops in run.loops])
        for run, by_loops in zip(runs, phases, strict=True)
    ]
    depths = sorted(set.intersection(*(set(run.validation) for run in runs)))
    print("\n| run | steps | seconds | " + " | ".join(f"depth {n}" for n in depths) + " |")
    print("|---|---:|---:|" + "---:|" * len(depths))
    for run, seconds in zip(runs, times, strict=True):
        losses = " | ".join(f"{run.validation[depth]:.3f}" for depth in depths)
        print(f"| {run.name} | {len(run.losses)} | {seconds[-1]:.0f} | {losses} |")
    if arguments.plot:
        plot(runs, times, arguments.window, arguments.plot)
    if arguments.json:
        numbers = {phase.name: phase.seconds for phase in every}
        arguments.json.write_text(json.dumps({**facts, "step_s": numbers}, indent=2), "utf-8")


if __name__ == "__main__":
    main()
