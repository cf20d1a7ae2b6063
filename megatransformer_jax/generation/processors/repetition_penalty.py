"""Repetition penalty (Keskar et al. 2019, arXiv 1909.05858)."""

import flax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from megatransformer_jax.generation.history import History
from megatransformer_jax.generation.processors.processor import Number, per_row


@flax.struct.dataclass
class RepetitionPenalty:
    """Divides positive scores of tokens that occurred, in the prompt too; multiplies negative ones.

    The state says which tokens have occurred.

    Attributes:
      penalty: [] or [B], above 0; 1 is off, more discourages.
      vocab_size: width of the logits; static.
    """

    penalty: Number
    vocab_size: int = flax.struct.field(pytree_node=False)

    def init(self, history: History) -> Bool[Array, "B V"]:
        """The tokens of the history."""
        rows = jnp.arange(history.tokens.shape[0])[:, None]
        tokens = jnp.where(history.content_mask(), history.tokens, self.vocab_size)
        occurred = jnp.zeros((history.tokens.shape[0], self.vocab_size), bool)
        return occurred.at[rows, tokens].set(True, mode="drop")

    def __call__(
        self, state: Bool[Array, "B V"], history: History, logits: Float[Array, "B V"]
    ) -> Float[Array, "B V"]:
        """The penalised scores."""
        penalty = per_row(self.penalty)
        return jnp.where(state, jnp.where(logits < 0, logits * penalty, logits / penalty), logits)

    def update(
        self, state: Bool[Array, "B V"], history: History, tokens: Int[Array, "B"]
    ) -> Bool[Array, "B V"]:
        """One token more."""
        return state.at[jnp.arange(tokens.shape[0]), tokens].set(True, mode="drop")
