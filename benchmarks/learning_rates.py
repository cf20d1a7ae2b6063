"""Which learning rates train: a run per recipe and rate, and the widest range that does.

    python -m benchmarks.learning_rates parcae:short parcae:short,huginn,adamw --results=rates.jsonl
    python -m benchmarks.learning_rates parcae:short --rates 0.004 0.008 --results=rates.jsonl

Each configuration is trained for its `train.steps` once per peak rate, from the same weights and on
the same batches, and judged by its validation loss at its mean depth. A step is compiled once per
configuration, with the rate as an argument. A run whose loss is not finite, or rises a quarter
above the first, ends there and has failed.

A rate **trains** if its validation loss is at most --tolerance nats above the best one of the same
configuration. The range is that of neighbouring rates around the best which all train; with a rate
at the end of those tried it is only a lower bound, marked ">=".

With --results each finished run is a line of JSON in a file, and runs that are in it are not made
again. --plot=FILE draws loss against rate.
"""

import argparse
import contextlib
import dataclasses
import itertools
import json
import math
import pathlib
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from megatransformer_jax.config.build import configure
from megatransformer_jax.config.option import UserError
from megatransformer_jax.config.run import RunConfig
from megatransformer_jax.config.run_kinds import require_transformer
from megatransformer_jax.data.pipeline import build_pipeline, validation_batches
from megatransformer_jax.evaluation.report import new_figure
from megatransformer_jax.evaluation.validation import ValidationSet, make_eval_step
from megatransformer_jax.runs.build import build_sharded_model, trained_depth
from megatransformer_jax.runs.tasks.start import fresh_state
from megatransformer_jax.runs.tokenizers import start_tokenizer
from megatransformer_jax.training.distributed import make_global_batch
from megatransformer_jax.training.lr_finder import has_diverged
from megatransformer_jax.training.optimizers import build_optimizer, build_schedule
from megatransformer_jax.training.optimizers import optimizer_with_schedule as with_schedule
from megatransformer_jax.training.step import make_train_step

RATES = tuple(5e-4 * 2**power for power in range(9))


@dataclasses.dataclass(frozen=True)
class Row:
    """One run. `loss` is the validation loss in nats, None if it failed after `steps` steps."""

    recipe: str
    rate: float
    seed: int
    steps: int
    loss: float | None
    seconds: float


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipes", nargs="+", help="experiments or presets")
    parser.add_argument("--rates", type=float, nargs="+", default=RATES, metavar="RATE")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, help="in place of train.steps")
    parser.add_argument("--tolerance", type=float, default=0.1, help="nats above the best")
    parser.add_argument("--results", type=pathlib.Path, help="JSON lines, read and extended")
    parser.add_argument("--plot", type=pathlib.Path, help="PNG of loss against rate")
    return parser.parse_args()


# ------------------------------------------------------------------------------
# Runs.


def make_runner(config: RunConfig, folder: pathlib.Path) -> Callable[[float], tuple[int, Any]]:
    """A function from a peak rate to the steps made and the validation loss, None if it failed."""
    tokenizer = start_tokenizer(config, folder)
    model, sharder = build_sharded_model(config)
    steps = config.train.steps
    unit = build_schedule(dataclasses.replace(config.optimizer, learning_rate=1.0), steps)

    def one_step(state: Any, rate: jax.Array, batch: Any) -> tuple[Any, Any]:
        optimizer = with_schedule(config.optimizer, lambda step: rate * unit(step), steps)
        return make_train_step(model, optimizer, config)(state, batch)

    train_step = jax.jit(one_step, donate_argnums=0)
    optimizer = build_optimizer(config.optimizer, steps)
    with contextlib.closing(build_pipeline(config.data, tokenizer, split="train")) as pipeline:
        first = fresh_state(config, model, optimizer, sharder, tokenizer, pipeline)
        batches = [make_global_batch(b, sharder) for b in itertools.islice(pipeline, steps)]
    held_out = validation_batches(config.data, tokenizer, num_batches=config.evaluation.num_batches)
    eval_step = jax.jit(make_eval_step(model, jax.random.key(config.train.seed)))
    held_out = [make_global_batch(batch, sharder) for batch in held_out]
    validation = ValidationSet(held_out, eval_step)

    def run(rate: float) -> tuple[int, float | None]:
        state, losses = jax.tree.map(jnp.copy, first), list[float]()
        for batch in batches:
            state, metrics = train_step(state, jnp.float32(rate), batch)
            losses.append(math.nan if metrics["skipped_in_row"] > 0 else float(metrics["loss"]))
            if has_diverged(losses):
                return len(losses), None
        loss = validation.score(state.params, trained_depth(config)).loss
        return len(losses), loss if math.isfinite(loss) else None

    return run


def make_rows(arguments: argparse.Namespace, known: Sequence[Row]) -> Iterator[Row]:
    """The runs that are asked for and not known yet."""
    done = {(row.recipe, row.rate, row.seed) for row in known}
    for recipe in arguments.recipes:
        rates = [rate for rate in arguments.rates if (recipe, rate, arguments.seed) not in done]
        if not rates:
            continue
        given: dict[str, Any] = {"train": {"seed": arguments.seed}}
        if arguments.steps:
            given["train"]["steps"] = arguments.steps
        config = require_transformer(configure(recipe, given))
        with tempfile.TemporaryDirectory() as folder:
            run = make_runner(config, pathlib.Path(folder))
            for rate in rates:
                begin = time.monotonic()
                steps, loss = run(rate)
                seconds = round(time.monotonic() - begin, 1)
                yield Row(recipe, rate, arguments.seed, steps, loss, seconds)


# ------------------------------------------------------------------------------
# What they say.


def training_range(rows: Sequence[Row], tolerance: float) -> tuple[float, float, bool]:
    """Lowest and highest rate of the range around the best, and whether it ends at a rate tried.

    Raises:
      UserError: if no run has a loss.
    """
    rows = sorted(rows, key=lambda row: row.rate)
    losses = [math.inf if row.loss is None else row.loss for row in rows]
    best = min(losses)
    if math.isinf(best):
        raise UserError(f"{rows[0].recipe}: no rate trains; try lower ones with --rates.")
    first = last = losses.index(best)
    while first > 0 and losses[first - 1] <= best + tolerance:
        first -= 1
    while last + 1 < len(rows) and losses[last + 1] <= best + tolerance:
        last += 1
    return rows[first].rate, rows[last].rate, first == 0 or last + 1 == len(rows)


def tables(rows: Sequence[Row], tolerance: float) -> str:
    """Losses by rate, and the ranges, as Markdown."""
    recipes = list(dict.fromkeys(row.recipe for row in rows))
    by_key: dict[tuple[str, float], list[Row]] = {}
    for row in rows:
        by_key.setdefault((row.recipe, row.rate), []).append(row)
    lines = ["| rate | " + " | ".join(recipes) + " |", "|---|" + "---:|" * len(recipes)]
    for rate in sorted({row.rate for row in rows}):
        cells = (", ".join(map(_cell, by_key.get((recipe, rate), ()))) for recipe in recipes)
        lines.append(f"| {rate:g} | " + " | ".join(cells) + " |")
    lines += ["", "| recipe | seed | rates that train | highest / lowest |", "|---|---|---|---:|"]
    for recipe, seed in dict.fromkeys((row.recipe, row.seed) for row in rows):
        own = [row for row in rows if (row.recipe, row.seed) == (recipe, seed)]
        low, high, is_open = training_range(own, tolerance)
        bound = ">= " if is_open else ""
        lines.append(f"| {recipe} | {seed} | {low:g} to {high:g} | {bound}{high / low:.3g} |")
    return "\n".join(lines)


def _cell(row: Row) -> str:
    return f"failed at step {row.steps}" if row.loss is None else f"{row.loss:.3f}"


def plot(rows: Sequence[Row], path: pathlib.Path) -> None:
    """Loss against rate, a line per recipe; failed runs are crosses at the top."""
    figure = new_figure(6, 4)
    axes = figure.subplots()
    top = max((row.loss for row in rows if row.loss is not None), default=1.0)
    for number, recipe in enumerate(dict.fromkeys(row.recipe for row in rows)):
        own = sorted((row for row in rows if row.recipe == recipe), key=lambda row: row.rate)
        good = [(row.rate, row.loss) for row in own if row.loss is not None]
        colour = f"C{number}"
        rates, losses = [rate for rate, _ in good], [loss for _, loss in good]
        axes.plot(rates, losses, "o-", color=colour, label=recipe)
        failed = [row.rate for row in own if row.loss is None]
        axes.plot(failed, [top] * len(failed), "x", color=colour)
    axes.set_xscale("log")
    axes.set_xlabel("peak learning rate")
    axes.set_ylabel("validation loss (nats)")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=90)


def read_rows(path: pathlib.Path | None) -> list[Row]:
    if path is None or not path.exists():
        return []
    return [Row(**json.loads(line)) for line in path.read_text("utf-8").splitlines()]


def main() -> None:
    arguments = parse_arguments()
    try:
        if min(arguments.rates) <= 0:
            raise UserError(f"--rates={arguments.rates}: all must be above 0.")
        rows = read_rows(arguments.results)
        print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}", flush=True)
        for row in make_rows(arguments, rows):
            print(f"{row.recipe} at {row.rate:g}: {_cell(row)}, {row.seconds} s", flush=True)
            rows.append(row)
            if arguments.results:
                with arguments.results.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(dataclasses.asdict(row)) + "\n")
        print("\n" + tables(rows, arguments.tolerance))
        if arguments.plot:
            plot(rows, arguments.plot)
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
