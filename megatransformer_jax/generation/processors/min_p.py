"""Min-p (Nguyen et al. 2024, arXiv 2407.01082)."""

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
)


@flax.struct.dataclass
class MinP(Stateless):
    """Keeps tokens that have at least a fraction of the likeliest one's probability.

    Attributes:
      min_p: [] or [B], from 0, which is off, to 1.
    """

    min_p: Number

    def __call__(
        self, state: State, history: History, logits: Float[Array, "B V"]
    ) -> Float[Array, "B V"]:
        """The scores with the less likely tokens banned."""
        # The softmax's denominator cancels out.
        lowest = jnp.max(logits, axis=-1, keepdims=True) + jnp.log(per_row(self.min_p))
        return jnp.where(logits >= lowest, logits, BANNED)
