"""The end of a run: scores by depth as a table, as JSON and as a plot."""

import pathlib
from typing import Any

from absl import logging
from rich import box
from rich.console import Console
from rich.table import Table

from experiments.assemble import Vocabulary, trained_depth
from megatransformer_jax.config.run import RunConfig
from megatransformer_jax.evaluation.answers import answer_samples
from megatransformer_jax.evaluation.depth_table import (
    evaluated_depths,
    make_table,
    score_depths,
    write_depth_table,
)
from megatransformer_jax.evaluation.validation import Scores, ValidationSet

NUM_PROBLEMS = 3
LOG_WIDTH = 100


def summarize(
    config: RunConfig,
    workdir: pathlib.Path,
    params: Any,
    validation_set: ValidationSet,
    vocabulary: Vocabulary,
    console: Console | None,
) -> list[Scores]:
    """Scores the validation set at every depth; the primary process shows and writes it.

    Args:
      config: of the run.
      workdir: gets depth_table.json and depth_table.png; the table is added to its train.log.
      params: the trained parameters.
      validation_set: what is scored.
      vocabulary: to show problems as text.
      console: where the table is printed; None on other processes, which compute only.
    """
    depths = evaluated_depths(config)
    scores = score_depths(params, validation_set, depths)
    is_reasoning = vocabulary.tokenizer is None
    problems: list[str] = []
    if is_reasoning:
        problems = answer_samples(
            params,
            validation_set.eval_step,
            validation_set.batches[0],
            depths,
            vocabulary.decode,
            count=NUM_PROBLEMS,
        )
    if console is None:
        return scores
    for problem in problems:
        console.print(problem, markup=False, highlight=False)
    table = make_table(scores, trained_depth(config), is_reasoning=is_reasoning)
    console.print(table)
    _append(workdir / "train.log", table)
    paths = write_depth_table(workdir, scores, trained_depth(config), is_reasoning=is_reasoning)
    logging.info("table and plot: %s, %s", *paths)
    return scores


def _append(path: pathlib.Path, table: Table) -> None:
    """Adds a table in plain characters; not through the log, because the screen has its own."""
    table.box = box.ASCII
    with open(path, "a", encoding="utf-8") as file:
        Console(file=file, width=LOG_WIDTH).print(table)
