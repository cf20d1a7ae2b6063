"""The Inception score equals exp of scipy's mean divergence."""

import numpy as np
import pytest
import scipy.stats

from megatransformer_jax.config.option import UserError
from megatransformer_jax.evaluation.media.features import inception_score


def test_it_equals_the_formula_by_scipy():
    rows = np.random.default_rng(0).dirichlet(np.full(5, 0.3), size=30)
    rows[0] = [1, 0, 0, 0, 0]
    parts = [
        np.exp(np.mean([scipy.stats.entropy(row, part.mean(axis=0)) for row in part]))
        for part in np.split(rows, 3)
    ]
    found = inception_score(rows, num_splits=3)
    assert found.mean == pytest.approx(np.mean(parts))
    assert found.deviation == pytest.approx(np.std(parts))


def test_its_bounds():
    # Sure of each image, and all classes equally often: the number of classes. All alike: 1.
    assert inception_score(np.eye(4)) == (pytest.approx(4), 0)
    assert inception_score(np.full((6, 4), 0.25)).mean == pytest.approx(1)
    assert inception_score(np.eye(4)[[1, 1, 1]]).mean == pytest.approx(1)


def test_wrong_input():
    with pytest.raises(UserError, match="num_splits=3 does not go with 2"):
        inception_score(np.eye(2), num_splits=3)
    with pytest.raises(UserError, match="num_splits=1 does not go with 0"):
        inception_score(np.zeros((0, 2)))
    for logits in (np.array([[2.0, 1.0]]), np.array([[2.0, -1.0]])):
        with pytest.raises(UserError, match="add up to 1"):
            inception_score(logits)
