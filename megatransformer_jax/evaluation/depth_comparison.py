"""Scores by depth of several runs in one table and one plot."""

import dataclasses
import json
import pathlib
from collections.abc import Sequence
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from megatransformer_jax.config.option import UserError

METRICS = {
    "loss": "validation loss (nats per token)",
    "accuracy": "token accuracy",
    "exact_accuracy": "exact-answer accuracy",
}


@dataclasses.dataclass(frozen=True)
class DepthCurve:
    """One metric of one run by depth."""

    label: str
    trained_depth: int
    depths: tuple[int, ...]
    values: tuple[float, ...]


def default_metric(workdirs: Sequence[pathlib.Path]) -> str:
    """Exact answers if all runs are of reasoning tasks, otherwise the loss, which every run has.

    Raises:
      UserError: if a run is not finished.
    """
    # Tables of before the flag do not tell.
    tables = [_read_table(workdir) for workdir in workdirs]
    is_reasoning = all(table.get("is_reasoning", False) for table in tables)
    return "exact_accuracy" if is_reasoning else "loss"


def read_curve(workdir: pathlib.Path, metric: str) -> DepthCurve:
    """Reads what a finished run wrote into its workdir.

    Raises:
      UserError: if the run is not finished, has no depth, or the metric is unknown.
    """
    if metric not in METRICS:
        raise UserError(f"unknown metric {metric!r}; choose one of {', '.join(METRICS)}.")
    content = _read_table(workdir)
    if content["trained_depth"] is None:
        raise UserError(f"{workdir} holds a model without a core, which has no depth to compare.")
    rows = content["rows"]
    return DepthCurve(
        label=workdir.name,
        trained_depth=content["trained_depth"],
        depths=tuple(row["depth"] for row in rows),
        values=tuple(float("nan") if row[metric] is None else row[metric] for row in rows),
    )


def _read_table(workdir: pathlib.Path) -> dict[str, Any]:
    path = workdir / "depth_table.json"
    if not path.is_file():
        raise UserError(f"{path} does not exist; name the workdir of a run that has finished.")
    return json.loads(path.read_text(encoding="utf-8"))


def plot_formats() -> list[str]:
    """Endings of file names that a plot can be written to."""
    return sorted(FigureCanvasAgg.get_supported_filetypes())


def markdown_table(curves: Sequence[DepthCurve]) -> str:
    """A row per depth and a column per run; '-' where a run has no such depth."""
    lines = ["| depth | " + " | ".join(curve.label for curve in curves) + " |"]
    lines.append("|---:|" + "---:|" * len(curves))
    for depth in sorted({depth for curve in curves for depth in curve.depths}):
        cells = []
        for curve in curves:
            value = dict(zip(curve.depths, curve.values, strict=True)).get(depth)
            star = "\\*" if depth == curve.trained_depth else ""
            cells.append("-" if value is None else f"{value:.3f}{star}")
        lines.append(f"| {depth} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot_curves(curves: Sequence[DepthCurve], metric: str) -> Figure:
    """One line per run over depth on a logarithmic axis; a dashed line at each trained mean."""
    figure = Figure(figsize=(6, 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for curve in curves:
        axes.plot(curve.depths, curve.values, marker="o", label=curve.label)
    for trained_depth in sorted({curve.trained_depth for curve in curves}):
        axes.axvline(trained_depth, color="gray", linestyle="--", label="trained mean")
    ticks = sorted({depth for curve in curves for depth in curve.depths})
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [str(depth) for depth in ticks])
    axes.minorticks_off()
    axes.set_xlabel("depth (iterations of the core)")
    axes.set_ylabel(METRICS[metric])
    axes.grid(alpha=0.3)
    axes.legend()
    return figure
