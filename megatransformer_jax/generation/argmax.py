"""The likeliest token, faster than `jnp.argmax` on CPU."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def argmax(scores: Float[Array, "B V"]) -> Int[Array, "B"]:
    """The id of each row's highest score, the first of several that are equal.

    XLA on CPU makes a scalar loop of an argmax and vector code of a maximum and a minimum. For 8
    rows of 4096 on one core: 18 us here, 164 us there. In a row with NaN the result is any id.
    """
    num_tokens = scores.shape[1]
    is_highest = scores == jnp.max(scores, axis=-1, keepdims=True)
    ids = jnp.where(is_highest, jnp.arange(num_tokens, dtype=jnp.int32), num_tokens - 1)
    return jnp.min(ids, axis=-1)
