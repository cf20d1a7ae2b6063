"""Locally typical sampling (Meister et al. 2022, arXiv 2202.00666)."""

import flax
import jax.numpy as jnp
from jaxtyping import Array, Float

from megatransformer_jax.generation.history import History
from megatransformer_jax.generation.processors.processor import (
    BANNED,
    Number,
    State,
    Stateless,
    per_row,
    safe_softmax,
)
from megatransformer_jax.generation.processors.threshold import largest_threshold, ordered_keys


@flax.struct.dataclass
class Typical(Stateless):
    """Keeps the tokens whose information is nearest to the entropy, until their mass is reached.

    Tokens that are as near as the last of them are kept too.

    Attributes:
      mass: [] or [B], above 0 and at most 1, which is off.
    """

    mass: Number

    def __call__(
        self, state: State, history: History, logits: Float[Array, "B V"]
    ) -> Float[Array, "B V"]:
        """The scores with the untypical tokens banned."""
        probabilities = safe_softmax(logits)
        is_possible = probabilities > 0
        information = -jnp.log(jnp.where(is_possible, probabilities, 1.0))
        entropy = jnp.sum(probabilities * information, axis=-1, keepdims=True)
        nearness = jnp.where(is_possible, -jnp.abs(information - entropy), -jnp.inf)
        keys = ordered_keys(nearness)
        threshold = largest_threshold(keys, probabilities, jnp.atleast_1d(self.mass))
        is_kept = (keys >= threshold) | (per_row(self.mass) >= 1)
        return jnp.where(is_kept, logits, BANNED)
