"""Makes diagnostics during training: a hook of the training loop."""

import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from absl import logging

from megatransformer_jax.evaluation.diagnostics.diagnoser import (
    Diagnoser,
    finite_scalars,
    write_images,
)
from megatransformer_jax.evaluation.diagnostics.kinds import Finding, Moment, kinds_of
from megatransformer_jax.evaluation.diagnostics.subject import Subject
from megatransformer_jax.training.metric_interface import MetricWriter

PREFIX = "diagnostics"


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
        self._diagnoser = Diagnoser(subject, kinds_of(subject))
        self._params_of = params_of
        self._writer = writer
        self._folder = folder

    def __call__(self, step: int, state: Any, scalars: Mapping[str, float]) -> dict[str, float]:
        """Returns the scalars that are finite."""
        previous = (step - 1) // self.every_steps * self.every_steps
        moment = Moment(self._params_of(state), state.key_data, step, previous)
        measured = self._diagnoser.measure(moment)
        if self._folder is None:
            return {}
        findings = self._diagnoser.present(measured, moment)
        folder = self._folder / f"step_{step:06d}"
        self._write(step, findings, folder)
        logging.info("diagnostics after step %d: %s", step, folder)
        return {f"{PREFIX}/{name}": value for name, value in finite_scalars(findings).items()}

    def _write(self, step: int, findings: Mapping[str, Finding], folder: pathlib.Path) -> None:
        images = write_images(findings, folder)
        self._writer.write_images(step, {f"{PREFIX}/{k}": image for k, image in images.items()})
        finite = {
            f"{PREFIX}/{name}": values[np.isfinite(values)]
            for finding in findings.values()
            for name, values in finding.histograms.items()
        }
        self._writer.write_histograms(step, {k: v for k, v in finite.items() if v.size})
