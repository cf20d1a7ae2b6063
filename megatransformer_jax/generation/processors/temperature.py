"""Temperature: divides the scores."""

import flax
import jax.numpy as jnp
from jaxtyping import Array, Float

from megatransformer_jax.generation.argmax import argmax
from megatransformer_jax.generation.history import History
from megatransformer_jax.generation.processors.processor import (
    BANNED,
    Number,
    State,
    Stateless,
    per_row,
)

# Scores that differ by 0.001 would be 100 e-folds apart: nothing but the highest can be drawn,
# and a lower divisor only risks an overflow.
GREEDY_BELOW = 1e-5


@flax.struct.dataclass
class Temperature(Stateless):
    """Divides the scores: below 1 favours likely tokens. 1 is off.

    0 (below GREEDY_BELOW) leaves only the likeliest token, the first of several that are equal, so
    that rows of one batch can be greedy while others draw.

    Attributes:
      temperature: [] or [B], at least 0.
    """

    temperature: Number

    def __call__(
        self, state: State, history: History, logits: Float[Array, "B V"]
    ) -> Float[Array, "B V"]:
        """The divided scores."""
        temperature = per_row(self.temperature)
        is_greedy = temperature < GREEDY_BELOW
        is_best = jnp.arange(logits.shape[1]) == argmax(logits)[:, None]
        scaled = logits / jnp.where(is_greedy, 1.0, temperature)
        return jnp.where(is_greedy & ~is_best, BANNED, scaled)
