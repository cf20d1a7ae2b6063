"""Top-k: keeps the k likeliest tokens."""

import flax
import jax.numpy as jnp
from jaxtyping import Array, Float

from megatransformer_jax.generation.history import History
from megatransformer_jax.generation.processors.processor import BANNED, Number, State, Stateless
from megatransformer_jax.generation.processors.threshold import largest_threshold, ordered_keys


@flax.struct.dataclass
class TopK(Stateless):
    """Keeps the k likeliest tokens and those that are as likely as the last of them.

    Attributes:
      top_k: int32 [] or [B], at least 1. The size of the vocabulary, or more, is off.
    """

    top_k: Number

    def __call__(
        self, state: State, history: History, logits: Float[Array, "B V"]
    ) -> Float[Array, "B V"]:
        """The scores with the other tokens banned."""
        keys = ordered_keys(logits)
        threshold = largest_threshold(keys, jnp.ones((1, 1), jnp.int32), jnp.atleast_1d(self.top_k))
        return jnp.where(keys >= threshold, logits, BANNED)
