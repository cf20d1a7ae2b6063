"""Least-squares losses and feature matching equal their formulas."""

import jax.numpy as jnp
import numpy as np
import pytest

from megatransformer_jax.losses.sound import (
    discriminator_loss,
    feature_matching_loss,
    generator_loss,
)


def features(seed: int) -> list[list[np.ndarray]]:
    """Two discriminators with two layers before the score."""
    rng = np.random.default_rng(seed)
    return [[rng.normal(size=(2, size, 3)) for size in sizes] for sizes in ((4, 3, 2), (6, 5, 1))]


def on_device(values: list[list[np.ndarray]]) -> list[list[jnp.ndarray]]:
    return [[jnp.asarray(value, jnp.float32) for value in one] for one in values]


def test_losses_are_means_over_outputs_then_over_discriminators() -> None:
    real, made = features(0), features(1)
    arrays = on_device(real), on_device(made)
    scores = [(r[-1], m[-1]) for r, m in zip(real, made, strict=True)]
    wanted = np.mean([np.mean((1 - r) ** 2) + np.mean(m**2) for r, m in scores])
    assert discriminator_loss(*arrays) == pytest.approx(wanted, rel=1e-5)
    wanted = np.mean([np.mean((1 - m) ** 2) for _, m in scores])
    assert generator_loss(arrays[1]) == pytest.approx(wanted, rel=1e-5)
    layers = [
        np.mean(np.abs(r - m))
        for reals, mades in zip(real, made, strict=True)
        for r, m in zip(reals[:-1], mades[:-1], strict=True)
    ]
    assert feature_matching_loss(*arrays) == pytest.approx(np.mean(layers), rel=1e-5)
