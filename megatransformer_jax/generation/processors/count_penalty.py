"""Presence and frequency penalties, with the meaning they have in OpenAI's API."""

import flax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from megatransformer_jax.generation.history import History
from megatransformer_jax.generation.processors.processor import Number, per_row


@flax.struct.dataclass
class CountPenalty:
    """Takes `presence + frequency * count` off the score of each token that was generated.

    Only generated tokens count; the prompt does not. The state is the count of each token.

    Attributes:
      presence: [] or [B]; 0 is off, below 0 encourages.
      frequency: [] or [B]; the same.
      vocab_size: width of the logits; static.
    """

    presence: Number
    frequency: Number
    vocab_size: int = flax.struct.field(pytree_node=False)

    def init(self, history: History) -> Int[Array, "B V"]:
        """The counts of the history's generated tokens."""
        rows = jnp.arange(history.tokens.shape[0])[:, None]
        tokens = jnp.where(history.generated_mask(), history.tokens, self.vocab_size)
        counts = jnp.zeros((history.tokens.shape[0], self.vocab_size), jnp.int32)
        return counts.at[rows, tokens].add(1, mode="drop")

    def __call__(
        self, state: Int[Array, "B V"], history: History, logits: Float[Array, "B V"]
    ) -> Float[Array, "B V"]:
        """The penalised scores."""
        return logits - (per_row(self.presence) * (state > 0) + per_row(self.frequency) * state)

    def update(
        self, state: Int[Array, "B V"], history: History, tokens: Int[Array, "B"]
    ) -> Int[Array, "B V"]:
        """One token more."""
        return state.at[jnp.arange(tokens.shape[0]), tokens].add(1, mode="drop")
