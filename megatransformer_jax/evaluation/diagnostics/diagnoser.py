"""Makes several kinds of diagnostics at once, each measurement one time."""

import json
import pathlib
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from matplotlib.image import imsave

from megatransformer_jax.evaluation.diagnostics.figures import to_image
from megatransformer_jax.evaluation.diagnostics.kinds import (
    Finding,
    Moment,
    build_measure,
    measurement_of,
    present,
)
from megatransformer_jax.evaluation.diagnostics.subject import Subject


class Diagnoser:
    """Compiles each measurement on its first use.

    Args:
      subject: what is looked at.
      kinds: which, see `kinds_of`.
    """

    def __init__(self, subject: Subject, kinds: Sequence[str]):
        self._subject = subject
        self._kinds = tuple(kinds)
        names = dict.fromkeys(map(measurement_of, self._kinds))
        self._measures = {name: build_measure(name, subject) for name in names}

    def measure(self, moment: Moment) -> Mapping[str, object]:
        """NumPy arrays by measurement. All processes call this together."""
        return jax.device_get({name: measure(moment) for name, measure in self._measures.items()})

    def present(self, measured: Mapping[str, object], moment: Moment) -> dict[str, Finding]:
        """What to show of them, by kind."""
        return {
            kind: present(kind, measured[measurement_of(kind)], self._subject, moment)
            for kind in self._kinds
        }


def write_images(findings: Mapping[str, Finding], folder: pathlib.Path) -> dict[str, np.ndarray]:
    """Writes `<kind>.png` into the folder, which is made, and returns the pixels by kind."""
    folder.mkdir(parents=True, exist_ok=True)
    images = {kind: to_image(finding.figure) for kind, finding in findings.items()}
    for kind, image in images.items():
        imsave(folder / f"{kind}.png", image)
    return images


def finite_scalars(findings: Mapping[str, Finding]) -> dict[str, float]:
    """The scalars of all findings without those that are not finite."""
    return {
        name: float(value)
        for finding in findings.values()
        for name, value in finding.scalars.items()
        if np.isfinite(value)
    }


def write_scalars(findings: Mapping[str, Finding], path: pathlib.Path) -> None:
    """Writes them to a JSON file."""
    path.write_text(json.dumps(finite_scalars(findings), indent=2) + "\n", encoding="utf-8")
