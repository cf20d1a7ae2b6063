"""What a logits processor is: a small pytree that changes the scores of the next token.

Its type and its static fields are structure, its numbers are leaves: under jit another number
compiles nothing, and each may be one for all rows, [], or one per row, [B]. Below: chains of
processors, the cut that several of them share, the tokens that may be drawn at all.
"""

import typing

import flax
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Num, Shaped

from megatransformer_jax.data.media_tokenizer import MediaTokenizer
from megatransformer_jax.data.tokenizer import Tokenizer
from megatransformer_jax.generation.history import History

# ------------------------------------------------------------------------------
# The protocol.

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


# ------------------------------------------------------------------------------
# A chain of processors: a tuple, passed through jit as an ordinary argument.
#
# Adding or removing a processor compiles once; changing its numbers compiles nothing. `build.py`
# puts the processors in the order in which Hugging Face's `generate` has them.
#
# A chain may ban every token of a row, for example a no-repeat n-gram of one token once all have
# been used. The row is then -inf throughout, never NaN, and nothing can be drawn from it;
# `is_exhausted` says so and the caller has to end the row.

Chain = tuple[Processor, ...]


def init_chain(chain: Chain, history: History) -> tuple[State, ...]:
    """The states of all processors for a history."""
    return tuple(processor.init(history) for processor in chain)


def apply_chain(
    chain: Chain, states: tuple[State, ...], history: History, logits: Float[Array, "B V"]
) -> Float[Array, "B V"]:
    """The scores after all processors, in float32."""
    logits = logits.astype(jnp.float32)
    for processor, state in zip(chain, states, strict=True):
        logits = processor(state, history, logits)
    return logits


def update_chain(
    chain: Chain, states: tuple[State, ...], history: History, tokens: Int[Array, "B"]
) -> tuple[State, ...]:
    """The states after `tokens` were appended to `history`."""
    return tuple(
        processor.update(state, history, tokens)
        for processor, state in zip(chain, states, strict=True)
    )


def is_exhausted(logits: Float[Array, "B V"]) -> Bool[Array, "B"]:
    """Rows in which every token is banned."""
    return jnp.all(jnp.isneginf(logits), axis=-1)


# ------------------------------------------------------------------------------
# Finds by bisection where to cut a row of scores, without sorting it.
#
# The bits of a float32 are, up to the sign, in the order of the numbers. So the cut is found one
# bit at a time, by 32 passes of compare and sum over the row. On a CPU core a row of 4096 takes 30
# us, where XLA's sort takes 470 us and its top-k 400 us. The result is exact.

_LOWEST = -(2**31)


def ordered_keys(values: Float[Array, "B V"]) -> Int[Array, "B V"]:
    """int32 keys in the order of the float32 values; equal values have equal keys."""
    values = jnp.where(values == 0, 0.0, values).astype(jnp.float32)  # -0.0 equals 0.0
    bits = jax.lax.bitcast_convert_type(values, jnp.int32)
    return jnp.where(bits < 0, bits ^ jnp.int32(2**31 - 1), bits)


def largest_threshold(
    keys: Int[Array, "B V"],
    weights: Num[Array, "#B #V"],
    target: Shaped[Array, "#B"],
    *,
    lowest: int = _LOWEST,
    num_bits: int = 32,
) -> Int[Array, "B 1"]:
    """The largest key at which the weights of all keys from it upward still reach the target.

    Args:
      keys: from `lowest` to `lowest + 2**num_bits - 1`.
      weights: not negative.
      target: above 0.
      lowest: lower end of the bisection.
      num_bits: passes.

    Returns:
      The threshold, one of the row's keys; `lowest` if all weights together do not reach the
      target.
    """

    def set_bit(index: Int[Array, ""], threshold: Int[Array, "B"]) -> Int[Array, "B"]:
        # The highest bit wraps from the lowest number to zero, as it should.
        candidate = threshold + (jnp.int32(1) << (num_bits - 1 - index))
        weight = jnp.sum(jnp.where(keys >= candidate[:, None], weights, 0), axis=-1)
        return jnp.where(weight >= target, candidate, threshold)

    start = jnp.full(keys.shape[0], lowest, jnp.int32)
    return jax.lax.fori_loop(0, num_bits, set_bit, start)[:, None]


# ------------------------------------------------------------------------------
# Keeps to the tokens that may be drawn at all.


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
    """Allows the tokenizer's ids except padding and the tokens around media, which are not text.

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


# ------------------------------------------------------------------------------
# The likeliest token, faster than `jnp.argmax` on CPU.


def argmax(scores: Float[Array, "B V"]) -> Int[Array, "B"]:
    """The id of each row's highest score, the first of several that are equal.

    XLA on CPU makes a scalar loop of an argmax and vector code of a maximum and a minimum. For 8
    rows of 4096 on one core: 18 us here, 164 us there. In a row with NaN the result is any id.
    """
    num_tokens = scores.shape[1]
    is_highest = scores == jnp.max(scores, axis=-1, keepdims=True)
    ids = jnp.where(is_highest, jnp.arange(num_tokens, dtype=jnp.int32), num_tokens - 1)
    return jnp.min(ids, axis=-1)
