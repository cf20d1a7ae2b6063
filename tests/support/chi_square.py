"""Pearson's test that counts come from a distribution."""

import jax
import numpy as np

# Of cells with less than this, the statistic has another distribution; they are one cell.
MIN_EXPECTED = 5.0


def p_value(counts, probs):
    """How often counts that do come from `probs` are as far from it, or farther.

    Counts where nothing can be have p = 0.
    """
    counts, probs = np.ravel(counts).astype(float), np.ravel(probs).astype(float)
    if np.any(counts[probs == 0]):
        return 0.0
    expected = probs / probs.sum() * counts.sum()
    order = np.argsort(expected)[np.sum(expected == 0) :]
    # The cells from the smallest on join until they are no longer too small.
    num_joined = max(
        int(np.sum(expected[order] < MIN_EXPECTED)),
        int(np.searchsorted(np.cumsum(expected[order]), MIN_EXPECTED)) + 1,
    )
    cells = [order[:num_joined], *order[num_joined:, None]]
    if len(cells) == 1:
        return 1.0
    expected, counts = (
        np.array([array[cell].sum() for cell in cells]) for array in (expected, counts)
    )
    statistic = np.sum((counts - expected) ** 2 / expected)
    return float(jax.scipy.stats.chi2.sf(statistic, len(cells) - 1))
