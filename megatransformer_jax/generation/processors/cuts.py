"""Processors that reshape or cut the distribution: temperature, top-k, top-p, min-p, typical."""

import flax
import jax.numpy as jnp
from jaxtyping import Array, Float

from megatransformer_jax.generation.history import History
from megatransformer_jax.generation.processors.processor import (
    BANNED,
    Number,
    State,
    Stateless,
    argmax,
    largest_threshold,
    ordered_keys,
    per_row,
    safe_softmax,
)

# ------------------------------------------------------------------------------
# Temperature: divides the scores.

# Scores that differ by 0.001 would be 100 e-folds apart: nothing but the highest can be drawn,
# and a lower divisor only risks an overflow.
GREEDY_BELOW = 1e-5


@flax.struct.dataclass
class Temperature(Stateless):
    """Divides the scores: below 1 favours likely tokens. 1 is off.

    0 (below GREEDY_BELOW) leaves only the likeliest token, the first of several that are equal, so
    that rows of one batch can be greedy while others draw.

    Attributes:
      temperature: [] or [B], at least 0.
    """

    temperature: Number

    def __call__(
        self, state: State, history: History, logits: Float[Array, "B V"]
    ) -> Float[Array, "B V"]:
        """The divided scores."""
        temperature = per_row(self.temperature)
        is_greedy = temperature < GREEDY_BELOW
        is_best = jnp.arange(logits.shape[1]) == argmax(logits)[:, None]
        scaled = logits / jnp.where(is_greedy, 1.0, temperature)
        return jnp.where(is_greedy & ~is_best, BANNED, scaled)


# ------------------------------------------------------------------------------
# Top-k: keeps the k likeliest tokens.


@flax.struct.dataclass
class TopK(Stateless):
    """Keeps the k likeliest tokens and those that are as likely as the last of them.

    Attributes:
      top_k: int32 [] or [B], at least 1. The size of the vocabulary, or more, is off.
    """

    top_k: Number

    def __call__(
        self, state: State, history: History, logits: Float[Array, "B V"]
    ) -> Float[Array, "B V"]:
        """The scores with the other tokens banned."""
        keys = ordered_keys(logits)
        threshold = largest_threshold(keys, jnp.ones((1, 1), jnp.int32), jnp.atleast_1d(self.top_k))
        return jnp.where(keys >= threshold, logits, BANNED)


# ------------------------------------------------------------------------------
# Top-p or nucleus sampling (Holtzman et al. 2019, arXiv 1904.09751).


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
        target = _above_zero(self.top_p)
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


def _above_zero(share: Number) -> Float[Array, "#B"]:
    """A share of the probability as it is looked for; float32 has 0 for what is almost none."""
    return jnp.maximum(jnp.atleast_1d(share).astype(jnp.float32), jnp.finfo(jnp.float32).tiny)


# ------------------------------------------------------------------------------
# Min-p (Nguyen et al. 2024, arXiv 2407.01082).


@flax.struct.dataclass
class MinP(Stateless):
    """Keeps tokens that have at least a fraction of the likeliest one's probability.

    Attributes:
      min_p: [] or [B], from 0, which is off, to 1.
    """

    min_p: Number

    def __call__(
        self, state: State, history: History, logits: Float[Array, "B V"]
    ) -> Float[Array, "B V"]:
        """The scores with the less likely tokens banned."""
        # The softmax's denominator cancels out.
        lowest = jnp.max(logits, axis=-1, keepdims=True) + jnp.log(per_row(self.min_p))
        return jnp.where(logits >= lowest, logits, BANNED)


# ------------------------------------------------------------------------------
# Locally typical sampling (Meister et al. 2022, arXiv 2202.00666).


@flax.struct.dataclass
class Typical(Stateless):
    """Keeps the tokens whose information is nearest to the entropy, until their mass is reached.

    Tokens that are as near as the last of them are kept too.

    Attributes:
      mass: [] or [B], above 0 and at most 1, which is off.
    """

    mass: Number

    def __call__(
        self, state: State, history: History, logits: Float[Array, "B V"]
    ) -> Float[Array, "B V"]:
        """The scores with the untypical tokens banned."""
        probabilities = safe_softmax(logits)
        is_possible = probabilities > 0
        information = -jnp.log(jnp.where(is_possible, probabilities, 1.0))
        entropy = jnp.sum(probabilities * information, axis=-1, keepdims=True)
        nearness = jnp.where(is_possible, -jnp.abs(information - entropy), -jnp.inf)
        keys = ordered_keys(nearness)
        threshold = largest_threshold(keys, probabilities, _above_zero(self.mass))
        is_kept = (keys >= threshold) | (per_row(self.mass) >= 1)
        return jnp.where(is_kept, logits, BANNED)
