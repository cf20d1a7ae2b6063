"""Pictures of media for people: contact sheets, and spectrograms."""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from megatransformer_jax.config.audio import MelConfig
from megatransformer_jax.evaluation.diagnostics.figures import to_image

# Longer captions are cut, so that they do not run into each other.
CAPTION_CHARACTERS = 24
TILE_INCHES = 1.4


@dataclasses.dataclass(frozen=True)
class Tile:
    """A picture of a contact sheet: float32 [H, W, C] in [-1, 1], and what stands below it."""

    image: np.ndarray
    caption: str = ""


def pixels_of(image: np.ndarray) -> np.ndarray:
    """uint8 of an image in [-1, 1], the same shape; what is beyond is cut off.

    Raises:
      ValueError: if a value is not finite.
    """
    if not np.isfinite(image).all():
        raise ValueError("the image has values that are not finite; the model has diverged")
    return np.round((np.clip(image, -1, 1) + 1) * 127.5).astype(np.uint8)


def contact_sheet(tiles: Sequence[Tile], columns: int | None = None) -> np.ndarray:
    """All tiles in a grid with their captions, uint8 [H, W, 3]. Pixels of small images stay sharp.

    Args:
      tiles: row by row.
      columns: of the grid; None: about as many as rows.

    Raises:
      ValueError: if there are no tiles, or an image is not finite.
    """
    if not tiles:
        raise ValueError("a contact sheet needs at least one image")
    columns = columns or math.ceil(math.sqrt(len(tiles)))
    rows = math.ceil(len(tiles) / columns)
    figure = _figure(TILE_INCHES * columns, (TILE_INCHES + 0.3) * rows)
    panels = figure.subplots(rows, columns, squeeze=False).reshape(-1)
    for axes in panels:
        axes.set_axis_off()
    for axes, tile in zip(panels, tiles, strict=False):
        pixels = pixels_of(tile.image)
        picture = np.broadcast_to(pixels, (*pixels.shape[:2], 3))
        axes.imshow(picture, interpolation="nearest")
        axes.set_title(_shortened(tile.caption), fontsize=8, y=-0.2)
    return to_image(figure)


def draw_mels(mels: Sequence[tuple[str, np.ndarray]], config: MelConfig) -> Figure:
    """Normalised log-mel spectrograms [F, M] below each other, each with its name; time to the
    right in seconds, mel bins upward, all in the same colours."""
    figure = _figure(7.0, 1.0 + 1.8 * len(mels))
    panels = figure.subplots(len(mels), 1, squeeze=False)[:, 0]
    longest = max(len(mel) for _, mel in mels) * config.hop_samples / config.sample_rate_hz
    for axes, (name, mel) in zip(panels, mels, strict=True):
        seconds = len(mel) * config.hop_samples / config.sample_rate_hz
        picture = axes.imshow(
            np.where(np.isfinite(mel), mel, np.nan).T,
            origin="lower",
            aspect="auto",
            extent=(0, seconds, 0, mel.shape[1]),
            vmin=-1,
            vmax=1,
            cmap="magma",
        )
        axes.set_xlim(0, longest)
        axes.set_ylabel("mel bin", fontsize=8)
        axes.set_title(name, fontsize=9)
    panels[-1].set_xlabel("seconds")
    figure.colorbar(picture, ax=list(panels), label="normalised log-mel")
    return figure


def _shortened(text: str) -> str:
    # Dollars would be taken for mathematics, and control characters have no glyphs.
    plain = "".join(c if c.isprintable() else " " for c in text).replace("$", r"\$")
    return plain if len(plain) <= CAPTION_CHARACTERS else plain[: CAPTION_CHARACTERS - 3] + "..."


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained", dpi=100)
    FigureCanvasAgg(figure)
    return figure
