"""Bans texts, in whatever tokens they would be written."""

import flax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from megatransformer_jax.generation.history import History
from megatransformer_jax.generation.processors.processor import BANNED
from megatransformer_jax.generation.text_automaton import TextAutomaton


@flax.struct.dataclass
class BannedTexts:
    """Bans every token that would complete one of the texts, inside it or at its end.

    A text may begin in the prompt. It is banned inside longer words too; to ban a word of its own
    only, give it with a blank before it. The state is the automaton's.

    Attributes:
      automaton: finds the texts.
    """

    automaton: TextAutomaton

    def init(self, history: History) -> Int[Array, "B"]:
        """How much of a text stands at the end of each row."""
        state = self.automaton.init(history.tokens.shape[0])
        return self.automaton.read(state, history.tokens, history.lengths)

    def __call__(
        self, state: Int[Array, "B"], history: History, logits: Float[Array, "B V"]
    ) -> Float[Array, "B V"]:
        """The scores with the completing tokens banned."""
        return jnp.where(self.automaton.completing(state), BANNED, logits)

    def update(
        self, state: Int[Array, "B"], history: History, tokens: Int[Array, "B"]
    ) -> Int[Array, "B"]:
        """One token more."""
        return self.automaton.update(state, tokens)[0]
