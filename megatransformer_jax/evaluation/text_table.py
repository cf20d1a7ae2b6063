"""Scores of generated texts as a function of depth: table, JSON and plot."""

import dataclasses
import json
import pathlib
from collections.abc import Mapping, Sequence

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.table import Table

from megatransformer_jax.evaluation.text_metrics import TextScores

# Heading, field and digits of each score.
_COLUMNS = (
    ("BLEU", "bleu", 2),
    ("chrF", "chrf", 2),
    ("ROUGE-1", "rouge1", 4),
    ("ROUGE-2", "rouge2", 4),
    ("ROUGE-L", "rouge_l", 4),
    ("exact match", "exact_match", 4),
)

# By depth; None where the depth is not known or there is none.
ScoresByDepth = Mapping[int | None, TextScores]


def make_text_table(scores: ScoresByDepth, trained_depth: int | None) -> Table:
    """A table with one row per depth; the trained mean is marked with a star."""
    table = Table(title=f"Scores of {next(iter(scores.values())).texts} texts")
    table.add_column("depth", justify="right")
    for heading, _, _ in _COLUMNS:
        table.add_column(heading, justify="right")
    for depth, row in scores.items():
        star = " *" if depth is not None and depth == trained_depth else ""
        cells = [f"{getattr(row, field):.{digits}f}" for _, field, digits in _COLUMNS]
        table.add_row("-" if depth is None else f"{depth}{star}", *cells)
    if trained_depth is not None:
        table.caption = f"* mean depth in training ({trained_depth})"
    return table


def write_text_scores(
    directory: pathlib.Path, scores: ScoresByDepth, trained_depth: int | None
) -> Sequence[pathlib.Path]:
    """Writes text_scores.json, and text_scores.png if there are several depths.

    Args:
      directory: an existing folder.
      scores: of the same texts by depth.
      trained_depth: mean depth in training, None if there is none.

    Returns:
      The paths of the files.
    """
    json_path = directory / "text_scores.json"
    rows = [{"depth": depth, **dataclasses.asdict(row)} for depth, row in scores.items()]
    content = {"trained_depth": trained_depth, "rows": rows}
    json_path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    if len(scores) < 2:
        return [json_path]
    png_path = directory / "text_scores.png"
    _plot(scores, trained_depth).savefig(png_path, dpi=120)
    return [json_path, png_path]


def _plot(scores: ScoresByDepth, trained_depth: int | None) -> Figure:
    # The object interface: pyplot would keep global state.
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    depths = [1 if depth is None else depth for depth in scores]
    panels = (("0 to 100", _COLUMNS[:2]), ("0 to 1", _COLUMNS[2:]))
    for axes, (label, columns) in zip(figure.subplots(1, 2), panels, strict=True):
        for heading, field, _ in columns:
            values = [getattr(row, field) for row in scores.values()]
            axes.plot(depths, values, marker="o", label=heading)
        axes.set_xscale("log", base=2)
        axes.set_xticks(depths, [str(depth) for depth in depths])
        axes.minorticks_off()
        axes.set_xlabel("depth (iterations of the core)")
        axes.set_ylabel(label)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        if trained_depth is not None:
            axes.axvline(trained_depth, color="gray", linestyle="--", label="trained mean")
        axes.legend()
    return figure
