"""Classifier-free guidance (arXiv 2207.12598): conditions that are dropped, and two predictions."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from megatransformer_jax.models.decoders.decoder import Condition

# From noisy media [N, ...], times [N] in [0, 1] and conditions to a prediction [N, ...].
Denoiser = Callable[[jax.Array, jax.Array, Condition], jax.Array]


def without_context(condition: Condition) -> Condition:
    """Conditions that say nothing; networks put what they learned for this case in their place."""
    return condition.replace(is_context=jnp.zeros_like(condition.is_context))  # type: ignore[attr-defined]


def drop_conditions(condition: Condition, keys: Key[Array, "N"], rate: float) -> Condition:
    """Each condition says nothing with probability `rate`."""
    if rate == 0.0:
        return condition
    is_kept = jax.vmap(lambda key: jax.random.bernoulli(key, 1.0 - rate))(keys)
    return condition.replace(  # type: ignore[attr-defined]
        is_context=condition.is_context & is_kept[:, None]
    )


def guided(denoise: Denoiser, scale: Float[Array, ""] | float) -> Denoiser:
    """A denoiser that predicts unconditional + scale * (conditional - unconditional).

    Both predictions come from one call on twice as many media.
    """

    def denoise_guided(noisy: jax.Array, time: jax.Array, condition: Condition) -> jax.Array:
        twice = jax.tree.map(
            lambda *pair: jnp.concatenate(pair), condition, without_context(condition)
        )
        both = denoise(jnp.concatenate((noisy, noisy)), jnp.concatenate((time, time)), twice)
        conditional, unconditional = jnp.split(both, 2)
        return unconditional + scale * (conditional - unconditional)

    return denoise_guided


def apply_guidance(
    denoise: Denoiser, configured: float, given: Float[Array, ""] | float | None
) -> Denoiser:
    """Guidance by `given`, which may be traced, or else by the configured scale.

    A configured scale of 1 asks for the conditional prediction alone, which is one call.
    """
    if given is not None:
        return guided(denoise, given)
    return denoise if configured == 1.0 else guided(denoise, configured)
