"""Scores a model with images and sound at each depth, on held-out data and on what it makes."""

import pathlib
from collections.abc import Sequence

import jax
from matplotlib.image import imsave
from rich.console import Console
from rich.progress import Progress

from experiments.evaluate_flags import EvaluateOptions
from experiments.load_model import LoadedModel
from experiments.media_measures import MediaMeasures
from experiments.resynthesize import resynthesize
from megatransformer_jax.config.run import RunConfig
from megatransformer_jax.evaluation.media.table import (
    MediaRow,
    make_class_table,
    make_media_table,
    make_resynthesis_table,
    write_media_scores,
)
from megatransformer_jax.types import Batch


def evaluate_media(
    options: EvaluateOptions,
    loaded: LoadedModel,
    run: RunConfig,
    batches: Sequence[Batch],
    depths: Sequence[int | None],
    state_key: jax.Array,
    output: pathlib.Path,
    progress: Progress,
) -> Sequence[pathlib.Path]:
    """Prints tables and writes media_scores.json, and drawn_digits.png if digits are drawn.

    Args:
      options: of the command.
      loaded: a model with media.
      run: its configuration.
      batches: the validation split, on the host.
      depths: iterations of the core; None: the model has none.
      state_key: of the core's first states; draws of media come from it too.
      output: an existing folder.
      progress: shows how far it is.

    Returns:
      The files that were written.
    """
    subject = MediaMeasures(options, loaded, run, batches, state_key)
    resynthesis = resynthesize(options, loaded, run)
    rows = []
    with progress:
        bar = progress.add_task("scoring", total=len(depths) * len(subject.measures))
        for depth in depths:
            found = {}
            for name, measure in subject.measures.items():
                found[name] = measure(depth)
                progress.advance(bar)
            rows.append(MediaRow(**found))
    mean = loaded.trained_depth
    console = Console()
    console.print(make_media_table(rows, mean))
    shown = next((row for row in rows if row.validation.depth == mean), rows[-1])
    at = "" if shown.validation.depth is None else f" at depth {shown.validation.depth}"
    if shown.drawn is not None:
        console.print(make_class_table(f"Drawn digits{at}", shown.drawn.recognition))
    if shown.spoken is not None:
        console.print(make_class_table(f"Spoken digits{at}", shown.spoken))
    if resynthesis is not None:
        console.print(make_resynthesis_table(resynthesis))
    paths = [write_media_scores(output, rows, mean, resynthesis)]
    if shown.drawn is not None:
        paths.append(output / "drawn_digits.png")
        imsave(paths[-1], subject.contact_sheet(shown.validation.depth))
    return paths
