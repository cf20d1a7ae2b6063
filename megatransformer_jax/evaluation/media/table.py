"""Scores and pictures of a model with media, for people: tables, JSON, contact sheets."""

import dataclasses
import math
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from rich.table import Table

from megatransformer_jax.config.audio import MelConfig
from megatransformer_jax.evaluation.diagnostics.figures import to_image
from megatransformer_jax.evaluation.media.judges import DrawnScores, Recognition
from megatransformer_jax.evaluation.media.sound_scores import ResynthesisScores, TranscriptErrors
from megatransformer_jax.evaluation.media.validation import MediaScores
from megatransformer_jax.evaluation.report import new_figure
from megatransformer_jax.storage import write_json

# ------------------------------------------------------------------------------
# Tables.


@dataclasses.dataclass(frozen=True)
class MediaRow:
    """What was measured at one depth; None for what the model or its data do not have.

    Attributes:
      validation: losses and accuracies on held-out data.
      transcripts: errors of greedy transcripts of held-out clips.
      drawn: of digits drawn from their names.
      spoken: of digits spoken from their names.
    """

    validation: MediaScores
    transcripts: TranscriptErrors | None = None
    drawn: DrawnScores | None = None
    spoken: Recognition | None = None


# Heading, digits, and where in a row the number is; not all rows have all.
_COLUMNS = (
    ("text loss", 4, "validation.loss"),
    ("token accuracy", 4, "validation.accuracy"),
    ("captions right", 3, "validation.tasks.caption.exact_accuracy"),
    ("transcripts right", 3, "validation.tasks.transcribe.exact_accuracy"),
    ("'which' right", 3, "validation.tasks.which.exact_accuracy"),
    ("'which_clip' right", 3, "validation.tasks.which_clip.exact_accuracy"),
    ("last captions right", 3, "validation.tasks.fewshot.exact_accuracy"),
    ("ends of documents right", 3, "validation.tasks.documents.exact_accuracy"),
    ("word errors", 3, "transcripts.word_error_rate"),
    ("image loss", 4, "validation.image_terms.loss"),
    ("audio loss", 4, "validation.audio_terms.loss"),
    ("drawn digits recognised", 3, "drawn.recognition.share"),
    ("FID ({features})", 2, "drawn.frechet_distance"),
    ("IS ({features})", 2, "drawn.inception_score"),
    ("spoken digits recognised", 3, "spoken.share"),
)


def make_media_table(rows: Sequence[MediaRow], trained_depth: int | None) -> Table:
    """One line per score and one column per depth; the trained mean is marked with a star."""
    table = Table(title="Held-out media by depth" if trained_depth else "Held-out media")
    table.add_column("depth")
    for row in rows:
        depth = row.validation.depth
        star = " *" if depth is not None and depth == trained_depth else ""
        table.add_column("-" if depth is None else f"{depth}{star}", justify="right")
    features = "" if rows[0].drawn is None else rows[0].drawn.features
    for heading, digits, path in _COLUMNS:
        values = [_value_at(path, row) for row in rows]
        if any(value is not None for value in values):
            cells = ["" if value is None else f"{value:.{digits}f}" for value in values]
            table.add_row(heading.format(features=features), *cells)
    for name in rows[0].validation.tasks:
        losses = [row.validation.tasks[name].loss for row in rows]
        table.add_row(f"text loss, task {name}", *[f"{loss:.4f}" for loss in losses])
    has_star = any(row.validation.depth == trained_depth for row in rows)
    table.caption = _caption(rows[0], trained_depth if has_star else None)
    return table


def make_class_table(title: str, found: Recognition) -> Table:
    """How many media of each class a judge recognises."""
    table = Table(title=title)
    for heading in ("digit", "made", "recognised", "most often taken for"):
        table.add_column(heading, justify="left" if heading == "digit" else "right")
    for row in found.by_class:
        table.add_row(row.name, str(row.media), str(row.recognised), row.mistaken_for or "-")
    table.add_row("all", str(found.media), f"{found.share:.1%}", "")
    table.caption = (
        f"the judge is right on {found.judge_accuracy:.1%} of {found.judge_media} real "
        "held-out ones"
    )
    return table


def make_resynthesis_table(scores: ResynthesisScores) -> Table:
    """Mean scores, and of how many clips."""
    table = Table(title=f"Held-out clips made again from their spectrograms by {scores.method}")
    for heading in ("score", "mean", "clips"):
        table.add_column(heading, justify="left" if heading == "score" else "right")
    for heading, score in (
        ("PESQ", scores.pesq),
        ("STOI", scores.stoi),
        ("SI-SDR (dB)", scores.si_sdr_db),
    ):
        if score is not None:
            mean = "-" if score.mean is None else f"{score.mean:.3f}"
            table.add_row(heading, mean, f"{score.clips} of {scores.clips}")
    return table


def write_media_scores(
    directory: pathlib.Path,
    rows: Sequence[MediaRow],
    trained_depth: int | None,
    resynthesis: ResynthesisScores | None = None,
) -> pathlib.Path:
    """Writes media_scores.json with all numbers of every depth; returns its path.

    Args:
      directory: an existing folder.
      rows: one per depth.
      trained_depth: mean depth in training, None if there is none.
      resynthesis: of held-out clips, if there are any.
    """
    path = directory / "media_scores.json"
    content = {
        "trained_depth": trained_depth,
        "rows": [dataclasses.asdict(row) for row in rows],
        "resynthesis": None if resynthesis is None else dataclasses.asdict(resynthesis),
    }
    write_json(path, content)
    return path


def _value_at(path: str, row: MediaRow) -> Any:
    """The number at a dotted path of attributes and keys; None if something on it is absent."""
    value: Any = row
    for name in path.split("."):
        value = value.get(name) if isinstance(value, dict) else getattr(value, name, None)
    return value


def _caption(row: MediaRow, trained_depth: int | None) -> str:
    notes = [] if trained_depth is None else [f"* mean depth in training ({trained_depth})"]
    if row.drawn is not None:
        what = "images" if row.drawn.recognition is None else "digits"
        notes.append(f"real training {what} have FID {row.drawn.frechet_distance_of_real:.2f}")
        if row.drawn.inception_score_of_real is not None:
            notes[-1] += f", real held-out ones IS {row.drawn.inception_score_of_real:.2f}"
    return "; ".join(notes)


# ------------------------------------------------------------------------------
# Pictures of media for people: contact sheets, and spectrograms.

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
    figure = new_figure(TILE_INCHES * columns, (TILE_INCHES + 0.3) * rows)
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
    figure = new_figure(7.0, 1.0 + 1.8 * len(mels))
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
