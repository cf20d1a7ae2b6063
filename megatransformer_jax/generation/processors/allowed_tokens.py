"""Keeps to the tokens that may be drawn at all."""

import flax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from megatransformer_jax.data.media_tokenizer import MediaTokenizer
from megatransformer_jax.data.tokenizer import Tokenizer
from megatransformer_jax.generation.history import History
from megatransformer_jax.generation.processors.processor import (
    BANNED,
    Number,
    State,
    Stateless,
)


@flax.struct.dataclass
class AllowedTokens(Stateless):
    """Bans every token outside a set.

    Attributes:
      is_allowed: bool [V] or [B, V].
    """

    is_allowed: Number

    def __call__(
        self, state: State, history: History, logits: Float[Array, "B V"]
    ) -> Float[Array, "B V"]:
        """The scores with the other tokens banned."""
        return jnp.where(self.is_allowed, logits, BANNED)


def allowed_tokens(tokenizer: Tokenizer, vocab_size: int) -> AllowedTokens:
    """Allows the tokenizer's ids except padding and the tokens around media, which are no text.

    A tokenizer without a padding token of its own pads with its end token, which stays allowed.

    Args:
      tokenizer: whose ids may be drawn.
      vocab_size: width of the logits; the model may have more rows than the tokenizer has ids.

    Raises:
      ValueError: if the model has fewer.
    """
    if vocab_size < tokenizer.vocab_size:
        raise ValueError(
            f"the model has a vocabulary of {vocab_size} and the tokenizer one of "
            f"{tokenizer.vocab_size}; use the tokenizer that the model was trained with."
        )
    ids = np.arange(vocab_size)
    is_text = (ids < tokenizer.vocab_size) & (ids != tokenizer.pad_id)
    if isinstance(tokenizer, MediaTokenizer):
        is_text &= ids < tokenizer.base.vocab_size
    return AllowedTokens(jnp.asarray(is_text | (ids == tokenizer.eos_id)))
