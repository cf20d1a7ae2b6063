"""Frechet distance between the features of two sets of media (Heusel et al., 2017, 1706.08500).

With Inception-v3 as the extractor of image features this is the FID. With any other extractor it
is another number, which compares only with those of the same extractor: name it with the result.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from megatransformer_jax.config.option import UserError

# Eigenvalues that rounding made negative; relative to the largest.
_ROUNDING = 1e-6


class Moments(NamedTuple):
    """Mean and covariance of features, float64."""

    mean: Float[np.ndarray, "K"]
    covariance: Float[np.ndarray, "K K"]


def moments(features: Float[np.ndarray, "N K"]) -> Moments:
    """Mean and unbiased covariance of N rows of features.

    Raises:
      UserError: if there are fewer than two rows, or a value is not finite.
    """
    if len(features) < 2:
        raise UserError(
            f"a covariance needs at least 2 media, and there are {len(features)}; give more."
        )
    rows = np.asarray(features, np.float64)
    if not np.isfinite(rows).all():
        raise UserError(
            "features hold values that are not finite; look at the media they come from."
        )
    mean = rows.mean(axis=0)
    centred = rows - mean
    return Moments(mean, centred.T @ centred / (len(rows) - 1))


def frechet_distance(first: Moments, second: Moments) -> float:
    """Squared Frechet (2-Wasserstein) distance between two Gaussians; 0 to infinity, 0 is best.

    |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)). The trace of the root comes from the eigenvalues
    of C1^(1/2) C2 C1^(1/2), which is symmetric, so that nothing complex arises and covariances
    without full rank do no harm.

    Raises:
      UserError: if the numbers of features differ.
    """
    if first.mean.shape != second.mean.shape:
        raise UserError(
            f"{first.mean.size} and {second.mean.size} features do not compare; take both from one "
            "extractor."
        )
    root = _symmetric_root(first.covariance)
    eigenvalues = _non_negative(np.linalg.eigvalsh(root @ second.covariance @ root))
    trace = np.trace(first.covariance) + np.trace(second.covariance)
    difference = first.mean - second.mean
    distance = difference @ difference + trace - 2 * np.sqrt(eigenvalues).sum()
    return max(float(distance), 0.0)


def _symmetric_root(matrix: np.ndarray) -> np.ndarray:
    values, vectors = np.linalg.eigh(matrix)
    return (vectors * np.sqrt(_non_negative(values))) @ vectors.T


def _non_negative(eigenvalues: np.ndarray) -> np.ndarray:
    if eigenvalues.min() < -_ROUNDING * max(eigenvalues.max(), 1.0):
        raise UserError(
            f"a covariance has the eigenvalue {eigenvalues.min():g}; it must have none below 0."
        )
    return np.maximum(eigenvalues, 0.0)
