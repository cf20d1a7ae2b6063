"""Processors that push against repetition and against early ends."""

import flax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from megatransformer_jax.generation.history import History
from megatransformer_jax.generation.processors.processor import (
    BANNED,
    Number,
    State,
    Stateless,
    ban,
    per_row,
)

# ------------------------------------------------------------------------------
# Repetition penalty (Keskar et al. 2019, arXiv 1909.05858).


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


# ------------------------------------------------------------------------------
# Presence and frequency penalties, with the meaning they have in OpenAI's API.


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


# ------------------------------------------------------------------------------
# No-repeat n-gram: no run of n tokens occurs twice.


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


# ------------------------------------------------------------------------------
# Keeps the text from ending too early.


@flax.struct.dataclass
class MinNewTokens(Stateless):
    """Bans the end tokens until a number of tokens has been generated.

    Attributes:
      count: int32 [] or [B]; 0 is off.
      end_ids: int32 [], [E] or [B, E], the end tokens; ids outside the vocabulary are none.
    """

    count: Number
    end_ids: Number

    def __call__(
        self, state: State, history: History, logits: Float[Array, "B V"]
    ) -> Float[Array, "B V"]:
        """The scores, without the end tokens where it is too early."""
        is_early = history.num_generated[:, None] < per_row(self.count)
        end_ids = jnp.atleast_1d(self.end_ids)[..., None, :]
        is_end = jnp.any(jnp.arange(logits.shape[1])[:, None] == end_ids, axis=-1)
        return jnp.where(is_early & is_end, BANNED, logits)


# ------------------------------------------------------------------------------
# Adds to the scores of some tokens, as `logit_bias` in OpenAI's API.


@flax.struct.dataclass
class LogitBias(Stateless):
    """Adds a number to the scores of a few tokens of each row.

    Attributes:
      ids: int32 [B, K], the tokens, each once; ids outside the vocabulary are none.
      bias: float32 [B, K].
    """

    ids: Number
    bias: Number

    def __call__(
        self, state: State, history: History, logits: Float[Array, "B V"]
    ) -> Float[Array, "B V"]:
        """The changed scores."""
        # A negative index would count from the end.
        ids = jnp.where(self.ids < 0, logits.shape[1], self.ids)
        return logits.at[jnp.arange(logits.shape[0])[:, None], ids].add(self.bias, mode="drop")
