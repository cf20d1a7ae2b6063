"""Makes diagnostics during training: a hook of the training loop."""

import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from absl import logging
from matplotlib.image import imsave

from megatransformer_jax.evaluation.diagnostics.figures import to_image
from megatransformer_jax.evaluation.diagnostics.kinds import (
    Finding,
    Moment,
    build_measure,
    kinds_of,
    measurement_of,
    present,
)
from megatransformer_jax.evaluation.diagnostics.subject import Subject
from megatransformer_jax.training.metric_interface import MetricWriter

FOLDER = "diagnostics"


class DiagnosticsHook:
    """Measures on all processes; the primary one draws and writes (a `Hook`).

    A figure of kind K after step n goes to `<folder>/step_<n>/K.png` and to the writer's images,
    histograms to the writer, scalars back to the loop. All are named `diagnostics/...`.

    Args:
      subject: what is looked at.
      params_of: from the train state to the model's parameters.
      writer: takes images and histograms.
      folder: where PNGs go. None: this process writes nothing.
    """

    at_stop = False
    skips_bad_steps = True

    def __init__(
        self,
        subject: Subject,
        params_of: Callable[[Any], Any],
        writer: MetricWriter,
        folder: pathlib.Path | None,
    ):
        self.every_steps = subject.config.diagnostics.every_steps
        self.at_end = self.every_steps > 0
        self._subject = subject
        self._params_of = params_of
        self._writer = writer
        self._folder = folder
        self._kinds = kinds_of(subject)
        names = dict.fromkeys(map(measurement_of, self._kinds))
        self._measures = {name: build_measure(name, subject) for name in names}

    def __call__(self, step: int, state: Any, scalars: Mapping[str, float]) -> dict[str, float]:
        """Returns the scalars that are finite."""
        previous = (step - 1) // self.every_steps * self.every_steps
        moment = Moment(self._params_of(state), state.key_data, step, previous)
        measured = {name: measure(moment) for name, measure in self._measures.items()}
        measured = jax.device_get(measured)
        if self._folder is None:
            return {}
        folder = self._folder / f"step_{step:06d}"
        folder.mkdir(parents=True, exist_ok=True)
        found: dict[str, float] = {}
        for kind in self._kinds:
            finding = present(kind, measured[measurement_of(kind)], self._subject, moment)
            self._write(step, kind, finding, folder)
            found |= finding.scalars
        logging.info("diagnostics after step %d: %s", step, folder)
        return {f"{FOLDER}/{k}": float(v) for k, v in found.items() if np.isfinite(v)}

    def _write(self, step: int, kind: str, finding: Finding, folder: pathlib.Path) -> None:
        image = to_image(finding.figure)
        imsave(folder / f"{kind}.png", image)
        self._writer.write_images(step, {f"{FOLDER}/{kind}": image})
        finite = {
            f"{FOLDER}/{name}": values[np.isfinite(values)]
            for name, values in finding.histograms.items()
        }
        self._writer.write_histograms(step, {k: v for k, v in finite.items() if v.size})
