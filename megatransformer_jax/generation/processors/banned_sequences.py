"""Bans sequences of token ids."""

from collections.abc import Sequence

import flax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from megatransformer_jax.generation.history import NO_TOKEN, History
from megatransformer_jax.generation.processors.processor import Number, State, Stateless, ban


@flax.struct.dataclass
class BannedSequences(Stateless):
    """Bans the last token of a sequence when the ones before it stand at the row's end.

    The beginning of a sequence may be in the prompt. The same text in other tokens is not banned;
    `BannedTexts` does that.

    Attributes:
      beginnings: int32 [W, L] or [B, W, L], each sequence without its last token, aligned to the
        right, NO_TOKEN before it.
      last_tokens: int32 [W] or [B, W]; NO_TOKEN: this sequence is off.
    """

    beginnings: Number
    last_tokens: Number

    def __call__(
        self, state: State, history: History, logits: Float[Array, "B V"]
    ) -> Float[Array, "B V"]:
        """The scores with the completing tokens banned."""
        recent = history.suffix(self.beginnings.shape[-1])[:, None]
        is_begun = jnp.all((self.beginnings == recent) | (self.beginnings == NO_TOKEN), axis=-1)
        return ban(logits, jnp.where(is_begun, self.last_tokens, NO_TOKEN))


def banned_sequences(sequences: Sequence[Sequence[int]]) -> BannedSequences:
    """Bans the same sequences in all rows.

    Raises:
      ValueError: if there is none, or an empty one.
    """
    if not sequences or not all(map(len, sequences)):
        raise ValueError(f"{sequences!r} to be banned; give at least one and no empty one.")
    longest = max(map(len, sequences)) - 1
    beginnings = np.full((len(sequences), longest), NO_TOKEN, np.int32)
    for row, sequence in enumerate(sequences):
        beginnings[row, longest + 1 - len(sequence) :] = sequence[:-1]
    last_tokens = np.asarray([sequence[-1] for sequence in sequences], np.int32)
    return BannedSequences(jnp.asarray(beginnings), jnp.asarray(last_tokens))
