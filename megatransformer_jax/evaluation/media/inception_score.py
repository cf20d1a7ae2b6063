"""Inception score (Salimans et al., 2016, 1606.03498) of class probabilities.

Named after Inception-v3, whose probabilities it was first computed from. With another classifier
it is another number: name the classifier with the result.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from megatransformer_jax.config.option import UserError


class InceptionScore(NamedTuple):
    """Mean and standard deviation over splits; 1 (worst) to the number of classes (best)."""

    mean: float
    deviation: float


def inception_score(probabilities: Float[np.ndarray, "N C"], num_splits: int = 1) -> InceptionScore:
    """exp of the mean over media of KL(p(class | medium) || p(class)), in each split.

    Args:
      probabilities: of the classes, each row adds up to 1.
      num_splits: parts of nearly equal size, in the order of the rows; p(class) is each part's own.

    Raises:
      UserError: if rows are no distributions, or there are fewer rows than splits.
    """
    if not 1 <= num_splits <= len(probabilities):
        raise UserError(
            f"num_splits={num_splits} does not go with {len(probabilities)} media; use 1 to "
            f"{max(len(probabilities), 1)} splits, and at least one medium."
        )
    rows = np.asarray(probabilities, np.float64)
    if not (np.all(rows >= 0) and np.allclose(rows.sum(axis=1), 1, atol=1e-3)):
        raise UserError(
            "each row of probabilities must be at least 0 everywhere and add up to 1; give the "
            "classifier's probabilities, not its logits."
        )
    scores = np.array([_score(part) for part in np.array_split(rows, num_splits)])
    return InceptionScore(float(scores.mean()), float(scores.std()))


def _score(rows: np.ndarray) -> float:
    # The mutual information of medium and class: H(class) - mean of H(class | medium).
    return float(np.exp(_entropy(rows.mean(axis=0, keepdims=True))[0] - _entropy(rows).mean()))


def _entropy(rows: np.ndarray) -> np.ndarray:
    return -(rows * np.log(np.where(rows > 0, rows, 1.0))).sum(axis=-1)
