"""Scores as a function of depth: table, JSON and plot, of one run or of several."""

import dataclasses
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.table import Table

from megatransformer_jax.config.option import UserError
from megatransformer_jax.config.run import RunConfig
from megatransformer_jax.evaluation.report import new_figure
from megatransformer_jax.evaluation.text_metrics import TextSize
from megatransformer_jax.evaluation.validation import PROBLEM_SCORES, Scores, ValidationSet
from megatransformer_jax.storage import AnyPath, check_reachable, write_json

# ------------------------------------------------------------------------------
# One run.


def evaluated_depths(config: RunConfig) -> tuple[int | None, ...]:
    """The depths of the table: the configured ones, or one row for a model without a core."""
    return config.evaluation.final_depths if config.model.is_recurrent else (None,)


def score_depths(
    params: Any, validation_set: ValidationSet, depths: Sequence[int | None]
) -> list[Scores]:
    """Scores the validation set at every depth, with one compilation for all."""
    return [validation_set.score(params, depth) for depth in depths]


# Heading and digits of each score.
_COLUMNS = {
    "loss": ("loss", 4),
    "perplexity": ("perplexity", 3),
    "accuracy": ("token accuracy", 4),
    "exact_accuracy": ("exact answers", 4),
}


def make_table(
    scores: Sequence[Scores],
    trained_depth: int | None,
    names: Sequence[str],
    text_size: TextSize | None = None,
) -> Table:
    """A table with one row per depth; the trained mean is marked with a star.

    The columns are the scores with these names, `TEXT_SCORES` or `PROBLEM_SCORES`. If the size of
    the text is known, bits per byte and perplexity per word are columns too.
    """
    table = Table(title="Validation by depth" if trained_depth else "Validation")
    headings = ["depth", *(_COLUMNS[name][0] for name in names)]
    headings += ["bits per byte", "word perplexity"] if text_size is not None else []
    for heading in headings:
        table.add_column(heading, justify="right")
    for row in scores:
        depth = "-" if row.depth is None else str(row.depth)
        is_trained = row.depth is not None and row.depth == trained_depth
        cells = [f"{getattr(row, name):.{_COLUMNS[name][1]}f}" for name in names]
        if text_size is not None:
            per_text = _scores_per_text(row, text_size)
            cells += [f"{per_text['bits_per_byte']:.4f}", f"{per_text['word_perplexity']:.2f}"]
        table.add_row(depth + (" *" if is_trained else ""), *cells)
    if any(row.depth is not None and row.depth == trained_depth for row in scores):
        table.caption = f"* mean depth in training ({trained_depth})"
    return table


def write_depth_table(
    directory: str | os.PathLike[str],
    scores: Sequence[Scores],
    trained_depth: int | None,
    names: Sequence[str],
    text_size: TextSize | None = None,
    votes: int = 1,
) -> tuple[Path, Path]:
    """Writes depth_table.json and depth_table.png.

    Args:
      directory: an existing folder.
      scores: one entry per depth.
      trained_depth: mean depth in training, or None for a model without a core.
      names: of the scores that are shown; the plot has the loss and the last of them.
      text_size: of the text that was predicted. If given, each row of the JSON file also has
        `bits_per_byte` and `word_perplexity`.
      votes: first states that voted; written to the JSON file if they are several.

    Returns:
      The paths of the JSON file and of the plot.
    """
    json_path = Path(directory, "depth_table.json")
    rows = depth_rows(scores, text_size)
    content = {"trained_depth": trained_depth, "shown": list(names), "rows": rows}
    content |= {"votes": votes} if votes > 1 else {}
    write_json(json_path, content)
    png_path = Path(directory, "depth_table.png")
    plot_scores(scores, trained_depth, names[-1]).savefig(png_path, dpi=120)
    return json_path, png_path


def depth_rows(scores: Sequence[Scores], text_size: TextSize | None = None) -> list[dict[str, Any]]:
    """The scores as plain values, one dictionary per depth; what is not finite is None."""
    values = [
        dataclasses.asdict(row) | (_scores_per_text(row, text_size) if text_size else {})
        for row in scores
    ]
    return [
        {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
        for row in values
    ]


def _scores_per_text(row: Scores, text_size: TextSize) -> dict[str, float]:
    nats = row.loss * row.tokens
    return {
        "bits_per_byte": text_size.bits_per_byte(nats),
        "word_perplexity": text_size.word_perplexity(nats),
    }


def plot_scores(scores: Sequence[Scores], trained_depth: int | None, second: str) -> Figure:
    """Loss and a second score over depth, on a logarithmic axis."""
    figure = new_figure(9.0, 3.6)
    depths = [1 if row.depth is None else row.depth for row in scores]
    for axes, field in zip(figure.subplots(1, 2), ("loss", second), strict=True):
        axes.plot(depths, [getattr(row, field) for row in scores], marker="o", color="tab:blue")
        axes.set_xscale("log", base=2)
        axes.set_xticks(depths, [str(depth) for depth in depths])
        axes.minorticks_off()
        axes.set_xlabel("depth (iterations of the core)")
        axes.set_ylabel(METRICS[field])
        axes.grid(alpha=0.3)
        if field == "exact_accuracy":
            axes.set_ylim(-0.03, 1.03)
        if trained_depth is not None:
            axes.axvline(trained_depth, color="tab:orange", linestyle="--", label="trained mean")
            axes.legend()
    return figure


# ------------------------------------------------------------------------------
# Several runs in one table and one plot.

METRICS = {
    "loss": "validation loss (nats per token)",
    "accuracy": "token accuracy",
    "exact_accuracy": "exact-answer accuracy",
}


@dataclasses.dataclass(frozen=True)
class DepthCurve:
    """One metric by depth: of one run, or the mean over several that differ in their seeds."""

    label: str
    trained_depth: int | None  # None for a model without a core.
    depths: tuple[int, ...]  # (0,) for a model without a core.
    values: tuple[float, ...]
    # Lowest and highest of the runs at each depth; None for a single run.
    lowest: tuple[float, ...] | None = None
    highest: tuple[float, ...] | None = None

    @property
    def is_level(self) -> bool:
        """Whether there is one depth only, so that a line over depth would be a point."""
        return len(self.depths) == 1


def parse_groups(words: Sequence[str]) -> list[tuple[str | None, tuple[str, ...]]]:
    """Label and folders of each word of `compare`: a folder, or 'LABEL=FOLDER,FOLDER'.

    Raises:
      UserError: for a group without a folder.

    Examples:
      >>> parse_groups(["runs/a", "both=runs/a,runs/b", "./lr=0.1"])
      [(None, ('runs/a',)), ('both', ('runs/a', 'runs/b')), (None, ('./lr=0.1',))]
    """
    groups: list[tuple[str | None, tuple[str, ...]]] = []
    for word in words:
        label, equals, names = word.partition("=")
        if not equals or "/" in label:
            groups.append((None, (word,)))
            continue
        folders = tuple(name for name in names.split(",") if name)
        if not label or not folders:
            raise UserError(
                f"{word!r} names no group; write LABEL=FOLDER,FOLDER with at least one folder."
            )
        groups.append((label, folders))
    return groups


def default_metric(workdirs: Sequence[AnyPath]) -> str:
    """Exact answers if the tables of all runs show them, otherwise the loss, which every run has.

    Raises:
      UserError: if a run is not finished.
    """
    metric = PROBLEM_SCORES[-1]
    tables = [_read_table(workdir) for workdir in workdirs]
    # Tables of version 0.1 have a flag in place of the names, older ones neither.
    shows = [metric in table.get("shown", ()) or table.get("is_reasoning") for table in tables]
    return metric if all(shows) else "loss"


def read_curve(workdirs: Sequence[AnyPath], metric: str, label: str | None = None) -> DepthCurve:
    """Reads what finished runs wrote into their workdirs; of several, their mean and range.

    Raises:
      UserError: if a run is not finished, the metric is unknown, or the runs were judged at
        different depths.
    """
    if metric not in METRICS:
        raise UserError(f"unknown metric {metric!r}; choose one of {', '.join(METRICS)}.")
    tables = [_read_table(workdir) for workdir in workdirs]
    depths = [tuple(row["depth"] or 0 for row in table["rows"]) for table in tables]
    for workdir, table, judged in zip(workdirs, tables, depths, strict=True):
        first = tables[0]["trained_depth"], depths[0]
        if (table["trained_depth"], judged) != first:
            raise UserError(
                f"{workdir} was trained at depth {table['trained_depth']} and judged at {judged}, "
                f"but {workdirs[0]} at {first[0]} and {first[1]}; group runs that differ in their "
                "seed only."
            )
    values = np.array(
        [[row[metric] for row in table["rows"]] for table in tables], np.float64
    )  # [runs, depths]; None becomes NaN.
    ranges = (tuple(map(float, bound)) for bound in (values.min(axis=0), values.max(axis=0)))
    lowest, highest = ranges if len(tables) > 1 else (None, None)
    return DepthCurve(
        label=label or workdirs[0].name,
        trained_depth=tables[0]["trained_depth"],
        depths=depths[0],
        values=tuple(map(float, values.mean(axis=0))),
        lowest=lowest,
        highest=highest,
    )


def _read_table(workdir: AnyPath) -> dict[str, Any]:
    check_reachable("model", workdir)
    path = workdir / "depth_table.json"
    if not path.is_file():
        raise UserError(f"{path} does not exist; name the workdir of a run that has finished.")
    return json.loads(path.read_text(encoding="utf-8"))


def plot_formats() -> list[str]:
    """Endings of file names that a plot can be written to."""
    return sorted(FigureCanvasAgg.get_supported_filetypes())


def markdown_table(curves: Sequence[DepthCurve]) -> str:
    """A row per depth and a column per curve; '-' where a curve has no such depth.

    A mean over several runs is followed by its lowest and highest run. What models without a core
    score stands in a row of its own, which has no depth.
    """
    lines = ["| depth | " + " | ".join(curve.label for curve in curves) + " |"]
    lines.append("|---:|" + "---:|" * len(curves))
    for depth in sorted({depth for curve in curves for depth in curve.depths}):
        cells = [_cell(curve, depth) for curve in curves]
        lines.append(f"| {depth or '-'} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(curve: DepthCurve, depth: int) -> str:
    if depth not in curve.depths:
        return "-"
    index = curve.depths.index(depth)
    star = "\\*" if depth == curve.trained_depth else ""
    spread = ""
    if curve.lowest is not None and curve.highest is not None:
        spread = f" ({curve.lowest[index]:.3f} to {curve.highest[index]:.3f})"
    return f"{curve.values[index]:.3f}{star}{spread}"


def plot_curves(curves: Sequence[DepthCurve], metric: str) -> Figure:
    """One line per curve over depth on a logarithmic axis; a dashed line at each trained mean.

    A band spans the lowest to the highest of several runs. A model that is judged at one depth
    only, such as one without a core, is a level dotted line.

    Raises:
      UserError: if no curve has two depths.
    """
    ticks = sorted({depth for curve in curves if not curve.is_level for depth in curve.depths})
    if not ticks:
        raise UserError(
            "none of these runs was judged at two depths or more; add a run of a model with a "
            "core, or judge one at others by `megatransformer evaluate --depths`."
        )
    # The names of many curves would cover them.
    is_crowded = len(curves) > 4
    figure = new_figure(8.4 if is_crowded else 6.0, 3.8)
    axes = figure.subplots()
    for curve in curves:
        across = (ticks[0], ticks[-1]) if curve.is_level else curve.depths
        repeats = 2 if curve.is_level else 1
        line = axes.plot(across, curve.values * repeats, label=curve.label)[0]
        line.set_linestyle(":" if curve.is_level else "-")
        line.set_marker("" if curve.is_level else "o")
        if curve.lowest is not None and curve.highest is not None:
            bounds = curve.lowest * repeats, curve.highest * repeats
            axes.fill_between(across, *bounds, color=line.get_color(), alpha=0.2, linewidth=0)
    trained = {curve.trained_depth or 0 for curve in curves if not curve.is_level}
    for number, trained_depth in enumerate(sorted(trained)):
        label = "trained mean" if number == 0 else None
        axes.axvline(trained_depth, color="gray", linestyle="--", label=label)
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [str(depth) for depth in ticks])
    axes.minorticks_off()
    axes.set_xlabel("depth (iterations of the core)")
    axes.set_ylabel(METRICS[metric])
    axes.grid(alpha=0.3)
    if is_crowded:
        figure.legend(loc="outside right upper")
    else:
        axes.legend()
    return figure
