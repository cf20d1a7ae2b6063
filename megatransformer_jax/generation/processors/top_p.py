"""Top-p or nucleus sampling (Holtzman et al. 2019, arXiv 1904.09751)."""

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
class TopP(Stateless):
    """Keeps the fewest likeliest tokens whose probabilities add up to at least p.

    Of equally likely tokens at the edge, those with the lowest ids are kept. (Hugging Face keeps as
    many, but which ones is left to an unstable sort.) The likeliest token is always kept.

    Attributes:
      top_p: [] or [B], above 0 and at most 1, which is off.
    """

    top_p: Number

    def __call__(
        self, state: State, history: History, logits: Float[Array, "B V"]
    ) -> Float[Array, "B V"]:
        """The scores with the tokens outside the nucleus banned."""
        num_tokens = logits.shape[1]
        target = jnp.atleast_1d(self.top_p).astype(jnp.float32)
        probabilities = safe_softmax(logits)
        keys = ordered_keys(logits)
        threshold = largest_threshold(keys, probabilities, target)
        is_edge = keys == threshold
        is_above = keys > threshold
        above = jnp.sum(jnp.where(is_above, probabilities, 0), axis=-1)
        # The same search among the tokens at the edge, by rising id.
        order = jnp.broadcast_to(jnp.arange(num_tokens, dtype=jnp.int32)[::-1], keys.shape)
        last = largest_threshold(
            order,
            jnp.where(is_edge, probabilities, 0),
            target - above,
            lowest=0,
            num_bits=num_tokens.bit_length(),
        )
        is_kept = is_above | (is_edge & (order >= last)) | (per_row(self.top_p) >= 1)
        return jnp.where(is_kept, logits, BANNED)
