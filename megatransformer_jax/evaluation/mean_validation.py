"""Validation of a model whose judges are means over rows, such as a vocoder's losses."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from absl import logging

# From (params, batch) to scalars by name, means over the rows of the batch.
Judge = Callable[[Any, Any], Mapping[str, jax.Array]]


class MeanValidation:
    """Held-out batches and what they are judged by.

    Args:
      batches: on the mesh.
      rows: of each batch that count, the weights of the batches' means.
      judge: compiled.

    Raises:
      ValueError: if there is no batch, or no row counts.
    """

    def __init__(self, batches: Sequence[Any], rows: Sequence[int], judge: Judge):
        if len(batches) != len(rows) or sum(rows) <= 0:
            raise ValueError(f"{len(batches)} batches with {list(rows)} rows; at least one counts")
        self.batches = tuple(batches)
        self._weights = np.array(rows, np.float64) / sum(rows)
        self._judge = judge

    def score(self, params: Any) -> dict[str, float]:
        """Means over all rows, by name; the same on every process."""
        scores = jax.device_get([self._judge(params, batch) for batch in self.batches])
        return {
            name: float(np.dot(self._weights, [float(score[name]) for score in scores]))
            for name in scores[0]
        }


class MeanValidationHook:
    """Scores held-out batches (a `Hook` of the training loop).

    Args:
      every_steps: steps between validations; the last step is validated too.
      validation: what is scored.
      params_of: from the train state to the parameters that are scored.
    """

    at_end = True
    at_stop = False
    skips_bad_steps = False

    def __init__(
        self, every_steps: int, validation: MeanValidation, params_of: Callable[[Any], Any]
    ):
        self.every_steps = every_steps
        self._validation = validation
        self._params_of = params_of

    def __call__(self, step: int, state: Any, scalars: Mapping[str, float]) -> dict[str, float]:
        """Returns each mean as validation/<its name>."""
        scores = self._validation.score(self._params_of(state))
        shown = "  ".join(f"{name} {value:.4f}" for name, value in scores.items())
        logging.info("validation after step %d: %s", step, shown)
        return {f"validation/{name}": value for name, value in scores.items()}
