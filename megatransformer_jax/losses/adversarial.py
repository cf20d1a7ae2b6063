"""Least-squares adversarial losses (arXiv 1611.04076) and feature matching (arXiv 1910.06711).

A discriminator's features are the outputs of its layers in order, the last of them its score,
which is to be 1 for recorded and 0 for generated sound. Losses are means over a discriminator's
outputs, then over discriminators.
"""

from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array, Float

Features = Sequence[Sequence[Array]]


def discriminator_loss(recorded: Features, generated: Features) -> Float[Array, ""]:
    """mean (1 - D(recorded))^2 + mean D(generated)^2."""
    losses = [
        jnp.mean(jnp.square(1 - _score(real))) + jnp.mean(jnp.square(_score(made)))
        for real, made in zip(recorded, generated, strict=True)
    ]
    return _mean(losses)


def generator_loss(generated: Features) -> Float[Array, ""]:
    """mean (1 - D(generated))^2."""
    return _mean([jnp.mean(jnp.square(1 - _score(made))) for made in generated])


def feature_matching_loss(recorded: Features, generated: Features) -> Float[Array, ""]:
    """Mean absolute difference of the features before the score."""
    losses = [
        jnp.mean(jnp.abs(real.astype(jnp.float32) - made.astype(jnp.float32)))
        for reals, mades in zip(recorded, generated, strict=True)
        for real, made in zip(reals[:-1], mades[:-1], strict=True)
    ]
    return _mean(losses)


def _score(features: Sequence[Array]) -> Array:
    return features[-1].astype(jnp.float32)


def _mean(losses: Sequence[Array]) -> Float[Array, ""]:
    return jnp.mean(jnp.stack(losses))
