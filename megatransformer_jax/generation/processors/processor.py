"""What a logits processor is: a small pytree that changes the scores of the next token.

Its type and its static fields are structure, its numbers are leaves: under jit another number
compiles nothing, and each may be one for all rows, [], or one per row, [B].
"""

import typing

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

from megatransformer_jax.generation.history import History

# A pytree whose every leaf has the leading axis B, so that beam search can gather rows; or ().
State = typing.Any

# An array, [] or [B]. Transformations put other things in its place, so it is not checked.
Number = typing.Any

BANNED = -jnp.inf


@typing.runtime_checkable
class Processor(typing.Protocol):
    """One change of the scores, with a state if it depends on more than the last tokens."""

    def init(self, history: History) -> State:
        """The state that belongs to a history, whether it has generated tokens or not."""
        ...

    def __call__(
        self, state: State, history: History, logits: Float[Array, "B V"]
    ) -> Float[Array, "B V"]:
        """The changed float32 scores; -inf bans a token. A banned token stays banned."""
        ...

    def update(self, state: State, history: History, tokens: Int[Array, "B"]) -> State:
        """The state after `tokens` were appended to `history`.

        Rows that are finished, to which nothing was appended, may get any state.
        """
        ...


class Stateless:
    """Base of the processors that need no more than the history."""

    def init(self, history: History) -> State:
        """Nothing."""
        return ()

    def update(self, state: State, history: History, tokens: Int[Array, "B"]) -> State:
        """Nothing."""
        return ()


def per_row(number: Number) -> Shaped[Array, "..."]:
    """A number [] as [1], numbers [B] as [B, 1], to go with logits [B, V]."""
    return jnp.asarray(number)[..., None]


def ban(logits: Float[Array, "B V"], tokens: Int[Array, "B _"]) -> Float[Array, "B V"]:
    """The scores with some tokens of each row banned; ids outside the vocabulary are none."""
    num_tokens = logits.shape[1]
    # A negative index would count from the end.
    tokens = jnp.where(tokens < 0, num_tokens, tokens)
    rows = jnp.arange(logits.shape[0])[:, None]
    return logits.at[rows, tokens].set(BANNED, mode="drop")


def safe_softmax(logits: Float[Array, "B V"]) -> Float[Array, "B V"]:
    """Probabilities; zeros instead of NaN in a row that has every token banned."""
    highest = jnp.max(logits, axis=-1, keepdims=True)
    weights = jnp.exp(logits - jnp.where(jnp.isfinite(highest), highest, 0.0))
    total = jnp.sum(weights, axis=-1, keepdims=True)
    return weights / jnp.maximum(total, jnp.finfo(weights.dtype).tiny)
