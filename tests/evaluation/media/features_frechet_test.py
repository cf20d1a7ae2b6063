"""The Frechet distance equals its closed forms and scipy's matrix root."""

import numpy as np
import pytest
import scipy.linalg

from megatransformer_jax.config.option import UserError
from megatransformer_jax.evaluation.media.features import Moments, frechet_distance, moments

RNG = np.random.default_rng(0)


def test_moments_are_numpys():
    features = RNG.normal(size=(20, 3)).astype(np.float32)
    found = moments(features)
    np.testing.assert_allclose(found.mean, features.mean(0), rtol=1e-5)
    np.testing.assert_allclose(found.covariance, np.cov(features, rowvar=False), rtol=1e-5)


def test_gaussians_without_correlation_have_a_closed_form():
    means, deviations = RNG.normal(size=(2, 5)), RNG.uniform(0.5, 2, size=(2, 5))
    first, second = (
        Moments(mean, np.diag(deviation**2))
        for mean, deviation in zip(means, deviations, strict=True)
    )
    wanted = np.sum((means[0] - means[1]) ** 2) + np.sum((deviations[0] - deviations[1]) ** 2)
    assert frechet_distance(first, second) == pytest.approx(wanted)


@pytest.mark.parametrize("num_rows", [40, 4])  # Fewer rows than features: no full rank.
def test_it_equals_the_formula_by_scipy(num_rows):
    samples = RNG.normal(size=(2, num_rows, 6)) @ RNG.normal(size=(6, 6))
    first, second = moments(samples[0]), moments(samples[1] + 1)
    root = scipy.linalg.sqrtm(first.covariance @ second.covariance + 1e-12 * np.eye(6))
    difference = first.mean - second.mean
    trace = np.trace(first.covariance + second.covariance - 2 * np.real(root))
    wanted = difference @ difference + trace
    assert frechet_distance(first, second) == pytest.approx(wanted, rel=1e-4)
    assert frechet_distance(second, first) == pytest.approx(frechet_distance(first, second))
    assert frechet_distance(first, first) == pytest.approx(0, abs=1e-6)


def test_wrong_input():
    with pytest.raises(UserError, match="at least 2 media, and there are 1"):
        moments(np.ones((1, 2)))
    with pytest.raises(UserError, match="not finite"):
        moments(np.array([[1.0], [np.nan]]))
    two, three = moments(np.eye(2)), moments(np.eye(3))
    with pytest.raises(UserError, match="2 and 3 features"):
        frechet_distance(two, three)
    with pytest.raises(UserError, match="eigenvalue"):
        frechet_distance(two, Moments(two.mean, -np.eye(2)))
