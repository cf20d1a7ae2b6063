"""Draws diagnostics with matplotlib's object interface: no pyplot, so no global state.

Values that are not finite are left out of every drawing.
"""

from collections.abc import Mapping

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from megatransformer_jax.evaluation.report import new_figure

MAX_HEADS = 8
MAX_LAYERS = 24
BINS = 80


def to_image(figure: Figure) -> np.ndarray:
    """The figure as pixels, uint8 [H, W, 3]."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.array(canvas.buffer_rgba())[..., :3]


def draw_curves(curves: Mapping[str, np.ndarray], mean_steps: int) -> Figure:
    """A panel per curve over iterations 1, 2, ..., with the trained mean marked."""
    figure = new_figure(4.2 * len(curves), 3.4)
    panels = figure.subplots(1, len(curves), squeeze=False)[0]
    for axes, (label, values) in zip(panels, curves.items(), strict=True):
        axes.plot(np.arange(1, len(values) + 1), _finite(values), marker=".", color="tab:blue")
        axes.set_xlabel("iteration of the core")
        axes.set_title(label, fontsize=10)
        axes.grid(alpha=0.3)
        _mark(axes, mean_steps)
    return figure


def mark_one(figure: Figure) -> None:
    """A line at 1 in every panel whose values come near it: the border of convergence."""
    for axes in figure.axes:
        axes.axhline(1.0, color="tab:red", linewidth=0.8, linestyle=":")


def draw_norms(gradient: Mapping[str, float], weight: Mapping[str, float]) -> Figure:
    """Bars of two norms by layer, on logarithmic axes."""
    figure = new_figure(9.0, 1.6 + 0.26 * len(gradient))
    places = np.arange(len(gradient))
    panels = figure.subplots(1, 2, sharey=True)
    for axes, (label, norms) in zip(
        panels, (("norm of the gradient", gradient), ("norm of the weights", weight)), strict=True
    ):
        values = _finite(np.array(list(norms.values())))
        # Zeros, which have no logarithm, become gaps.
        axes.barh(places, np.where(values > 0, values, np.nan), color="tab:blue")
        if (values > 0).any():
            axes.set_xscale("log")
        axes.set_xlabel(label)
        axes.tick_params(axis="x", which="both", labelsize=6)
        axes.grid(alpha=0.3, axis="x")
    panels[0].set_yticks(places, list(gradient), fontsize=7)
    panels[0].invert_yaxis()
    return figure


def draw_histograms(samples: Mapping[str, np.ndarray]) -> Figure:
    """The distribution of each sample as a row of a picture: brighter where more values are."""
    names = list(samples)
    finite = {name: sample[np.isfinite(sample)] for name, sample in samples.items()}
    largest = max((np.quantile(np.abs(v), 0.999) for v in finite.values() if len(v)), default=1.0)
    edges = np.linspace(-1.0, 1.0, BINS + 1) * (largest or 1.0)
    rows = [np.histogram(finite[name], edges)[0] / max(len(finite[name]), 1) for name in names]
    figure = new_figure(8.0, 1.6 + 0.2 * len(names))
    axes = figure.subplots()
    picture = axes.imshow(
        np.array(rows), aspect="auto", extent=(edges[0], edges[-1], len(names) - 0.5, -0.5)
    )
    axes.set_yticks(np.arange(len(names)), names, fontsize=6)
    axes.set_xlabel("activation (99.9% of the widest layer's are inside)")
    figure.colorbar(picture, label="share of values")
    return figure


def draw_by_layer(
    outer: Mapping[str, float], core: Mapping[str, np.ndarray], label: str, mean_steps: int
) -> Figure:
    """Layers outside of the core as bars, the core's as curves over the iterations."""
    figure = new_figure(9.5, 3.8)
    panels = figure.subplots(1, 2 if core else 1, squeeze=False)[0]
    places = np.arange(len(outer))
    panels[0].bar(places, _finite(np.array(list(outer.values()))), color="tab:blue")
    panels[0].set_xticks(places, list(outer), rotation=45, ha="right", fontsize=7)
    panels[0].set_ylabel(label)
    panels[0].grid(alpha=0.3, axis="y")
    if core:
        for name, values in core.items():
            panels[1].plot(np.arange(1, len(values) + 1), _finite(values), marker=".", label=name)
        panels[1].set_xlabel("iteration of the core")
        panels[1].grid(alpha=0.3)
        _mark(panels[1], mean_steps)
        if len(core) <= MAX_LAYERS:
            panels[1].legend(fontsize=7)
    return figure


def draw_maps(maps: Mapping[str, np.ndarray]) -> Figure:
    """A row of maps per layer, a column per head; the first `MAX_LAYERS` and `MAX_HEADS`."""
    shown = dict(list(maps.items())[:MAX_LAYERS])
    columns = min(MAX_HEADS, *(len(weights) for weights in shown.values()))
    figure = new_figure(1.5 + 1.5 * columns, 0.6 + 1.6 * len(shown))
    panels = figure.subplots(len(shown), columns, squeeze=False)
    for head, axes in enumerate(panels[0]):
        axes.set_title(f"head {head}", fontsize=7)
    for row, (name, weights) in zip(panels, shown.items(), strict=True):
        row[0].set_ylabel(name.replace("/iteration", "\niteration"), fontsize=7)
        for head, axes in enumerate(row):
            # The square root shows small weights, of which long rows have many.
            axes.imshow(np.sqrt(_finite(weights[head])), vmin=0, vmax=1, cmap="magma")
            axes.set_xticks([])
            axes.set_yticks([])
    figure.suptitle("attention: query down, key across; square root of the weight", fontsize=8)
    return figure


def draw_counts(counts: np.ndarray, title: str) -> Figure:
    """Bars of how often each number of iterations, from 1, was drawn."""
    figure = new_figure(7.0, 3.4)
    axes = figure.subplots()
    drawn = np.flatnonzero(counts)
    last = int(drawn[-1]) + 1 if len(drawn) else 1
    axes.bar(np.arange(1, last + 1), counts[:last], color="tab:blue")
    axes.set_xlabel("iterations drawn")
    axes.set_ylabel("how often")
    axes.set_title(title, fontsize=9)
    axes.grid(alpha=0.3, axis="y")
    return figure


def _finite(values: np.ndarray) -> np.ndarray:
    return np.where(np.isfinite(values), values, np.nan)


def _mark(axes: Axes, mean_steps: int) -> None:
    axes.axvline(mean_steps, color="tab:orange", linestyle="--", label="trained mean")
