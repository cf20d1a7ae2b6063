"""Keeps the text from ending too early."""

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
class MinNewTokens(Stateless):
    """Bans the end token until a number of tokens has been generated.

    Attributes:
      count: int32 [] or [B]; 0 is off.
      eos_id: int32 [], the end token.
    """

    count: Number
    eos_id: Number

    def __call__(
        self, state: State, history: History, logits: Float[Array, "B V"]
    ) -> Float[Array, "B V"]:
        """The scores, without the end token where it is too early."""
        is_early = history.num_generated[:, None] < per_row(self.count)
        is_end = jnp.arange(logits.shape[1]) == self.eos_id
        return jnp.where(is_early & is_end, BANNED, logits)
