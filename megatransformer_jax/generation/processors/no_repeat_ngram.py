"""No-repeat n-gram: no run of n tokens occurs twice."""

import flax
import jax.numpy as jnp
from jaxtyping import Array, Float

from megatransformer_jax.generation.history import History
from megatransformer_jax.generation.processors.processor import Number, State, Stateless, ban


@flax.struct.dataclass
class NoRepeatNgram(Stateless):
    """Bans tokens that would repeat a run of n tokens of the prompt or of the generated text.

    Attributes:
      size: int32 [] or [B], the n of each row. 0 is off.
      max_size: highest n that `size` may hold; static, as each costs one pass over the history.
    """

    size: Number
    max_size: int = flax.struct.field(pytree_node=False)

    def __call__(
        self, state: State, history: History, logits: Float[Array, "B V"]
    ) -> Float[Array, "B V"]:
        """The scores with the repeating tokens banned."""
        size = jnp.atleast_1d(self.size)[:, None]
        # A token at column c is banned if the n - 1 tokens before it are the last ones of the row.
        repeats = history.content_mask() & (size > 0)
        repeats &= jnp.arange(history.capacity) >= size - 1
        for distance in range(1, self.max_size):
            last = history.suffix(distance)[:, :1]
            is_same = jnp.roll(history.tokens, distance, axis=1) == last
            repeats &= is_same | (distance >= size)
        return ban(logits, jnp.where(repeats, history.tokens, logits.shape[1]))
