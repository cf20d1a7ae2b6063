"""The learning-rate range test of a run's configuration."""

import contextlib
import dataclasses
import functools
import pathlib
from collections.abc import Callable
from typing import Any

import jax
from absl import logging
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from megatransformer_jax.config.run import RunConfig
from megatransformer_jax.config.run_base import BaseRunConfig
from megatransformer_jax.config.run_kinds import require_transformer
from megatransformer_jax.data.media.records import MediaFormats
from megatransformer_jax.data.pipeline import build_pipeline
from megatransformer_jax.evaluation.report import new_figure
from megatransformer_jax.runs.build import (
    MemoryPlan,
    abstract_batches,
    abstract_train_state,
    build_sharded_model,
    check_augmentation,
)
from megatransformer_jax.runs.tasks.start import fresh_state
from megatransformer_jax.runs.tokenizers import start_tokenizer
from megatransformer_jax.runs.workdir import make_workdir, use_compilation_cache
from megatransformer_jax.storage import AnyPath, write_into, write_json
from megatransformer_jax.training.distributed import make_global_batch, start_distributed
from megatransformer_jax.training.lr_finder import (
    RangeTest,
    check_range,
    exponential_schedule,
    has_diverged,
    suggest,
)
from megatransformer_jax.training.micro_batch import budget_in_gib
from megatransformer_jax.training.optimizers import optimizer_with_schedule
from megatransformer_jax.training.step import make_train_step

_ROWS = 12


def find_learning_rate(run: BaseRunConfig, start: float, end: float, steps: int) -> RangeTest:
    """Trains with rates from `start` to `end`, then shows and writes what that says.

    Raises:
      UserError: if the range cannot be used, the loss never falls, or the run trains no
        transformer.
    """
    config = require_transformer(run)
    check_range(start, end, steps)
    use_compilation_cache(config.compilation_cache_dir)
    start_distributed(config.distributed)
    check_augmentation(config)
    workdir = make_workdir(config.workdir)
    schedule = exponential_schedule(start, end, steps)
    losses: list[float] = []
    with contextlib.ExitStack() as stack:
        next_loss = _start(config, workdir, schedule, stack)
        while len(losses) < steps and not (losses and has_diverged(losses)):
            losses.append(next_loss())
    rates = [float(schedule(step)) for step in range(len(losses))]
    if len(losses) < steps:
        logging.info("stopped at a learning rate of %.2e: the loss blew up", rates[-1])
    result = suggest(rates, losses)
    if jax.process_index() == 0:
        _show(result, config)
        paths = write_into(workdir, functools.partial(_write, result, config))
        logging.info("numbers and plot: %s, %s", *paths)
    return result


def _start(
    config: RunConfig,
    workdir: AnyPath,
    schedule: Callable[[Any], jax.Array],
    stack: contextlib.ExitStack,
) -> Callable[[], float]:
    """A function that makes one step of a new run and returns its loss."""
    tokenizer = start_tokenizer(config, workdir)
    model, sharder = build_sharded_model(config)
    # No average of the weights: it has no part in the steps.
    optimizer = optimizer_with_schedule(config.optimizer, schedule, config.train.steps)
    if config.train.memory_budget_gib is None:
        train_step: Any = jax.jit(make_train_step(model, optimizer, config), donate_argnums=0)
    else:
        plan = MemoryPlan(budget_in_gib(config.train.memory_budget_gib), None)
        config, train_step = plan.compile(
            config,
            functools.partial(make_train_step, model, optimizer),
            abstract_train_state(model, optimizer, sharder, config.fine_tuning),
            abstract_batches(config, sharder),
            sharder,
        )
    batches = build_pipeline(
        config.data,
        tokenizer,
        split="train",
        media=MediaFormats.of_model(config.model),
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    stack.callback(batches.close)
    state = fresh_state(config, model, optimizer, sharder, tokenizer, batches)

    def next_loss() -> float:
        nonlocal state
        state, metrics = train_step(state, make_global_batch(next(batches), sharder))
        # A step whose gradients are not finite is skipped whatever its loss.
        return float("nan") if metrics["skipped_in_row"] > 0 else float(metrics["loss"])

    return next_loss


def _show(result: RangeTest, config: RunConfig) -> None:
    table = Table("learning rate", "loss", "smoothed", title=f"{config.optimizer.name}")
    stride = max(1, -(-len(result.losses) // _ROWS))
    rows = zip(result.learning_rates, result.losses, result.smoothed, strict=True)
    for rate, loss, smoothed in list(rows)[::stride]:
        table.add_row(f"{rate:.2e}", f"{loss:.4f}", f"{smoothed:.4f}")
    console = Console()
    console.print(table)
    console.print(f"fastest fall at {result.steepest:.2e}, lowest at {result.minimum:.2e}")
    console.print(
        f"suggestion (a tenth of the latter): "
        f"--config.optimizer.learning_rate={result.suggestion:.1e}"
    )
    if result.is_still_falling:
        logging.warning("the loss was still falling at the last rate; try a higher --end.")


def _write(result: RangeTest, config: RunConfig, folder: pathlib.Path) -> list[pathlib.Path]:
    values = {"optimizer": config.optimizer.name, **dataclasses.asdict(result)}
    paths = [folder / "find_lr.json", folder / "find_lr.png"]
    write_json(paths[0], values)
    plot(result).savefig(paths[1], dpi=120)
    return paths


def plot(result: RangeTest) -> Figure:
    """Losses over learning rates, with what was found."""
    figure = new_figure(6.0, 3.8)
    axes = figure.add_subplot()
    axes.plot(result.learning_rates, result.losses, color="0.75", label="loss")
    axes.plot(result.learning_rates, result.smoothed, label="smoothed")
    for name, style in {"suggestion": "-", "steepest": "--", "minimum": ":"}.items():
        rate = getattr(result, name)
        axes.axvline(rate, linestyle=style, color="0.4", label=f"{name} {rate:.1e}")
    axes.set(xscale="log", xlabel="learning rate", ylabel="loss")
    axes.legend()
    return figure
