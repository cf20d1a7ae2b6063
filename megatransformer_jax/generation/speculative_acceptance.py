"""Speculative sampling: keeps a drafted token or replaces it, without changing the distribution.

Leviathan et al. 2022 (arXiv 2211.17192): a token drawn from q is kept with probability
min(1, p / q); otherwise one is drawn from max(p - q, 0), normalised. The result is distributed as p
whatever q is.
"""

import typing

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from megatransformer_jax.generation.argmax import argmax
from megatransformer_jax.generation.history import History
from megatransformer_jax.generation.processors.processor import safe_softmax

# Streams of random numbers. Each serves one purpose at each place of a row.
DRAFT, ACCEPT, REPLACE = range(3)


class Verdict(typing.NamedTuple):
    """What comes of drafted tokens.

    Attributes:
      tokens: int32 [B], the drafted ones or their replacements.
      is_accepted: bool [B], which are the drafted ones.
    """

    tokens: jax.Array
    is_accepted: jax.Array


def judge(
    scores: Float[Array, "B V"],
    draft_scores: Float[Array, "B V"],
    drafts: Int[Array, "B"],
    is_drafted: Bool[Array, "B"],
    accept_keys: Key[Array, "B"],
    replace_keys: Key[Array, "B"],
) -> Verdict:
    """Keeps or replaces one drafted token per row; a row without one gets a draw from p.

    Args:
      scores: log p up to a constant per row, -inf for banned tokens. A row that has all banned gets
        token 0, which means nothing.
      draft_scores: log q likewise.
      drafts: drawn from q.
      is_drafted: False where there is no draft.
      accept_keys: keys of the decision.
      replace_keys: keys of the replacement.
    """
    target = safe_softmax(scores)
    # Without a draft nothing can be kept, and what q leaves of p is p.
    draft = jnp.where(is_drafted[:, None], safe_softmax(draft_scores), 0.0)
    chance = jnp.take_along_axis(target, drafts[:, None], axis=1)[:, 0]
    draft_chance = jnp.take_along_axis(draft, drafts[:, None], axis=1)[:, 0]
    uniform = jax.vmap(jax.random.uniform)(accept_keys)
    is_accepted = is_drafted & (uniform * draft_chance < chance)

    residual = jnp.maximum(target - draft, 0.0)
    # Only rounding can reject where p and q are the same; then nothing is left of p.
    is_left = jnp.any(residual > 0, axis=-1, keepdims=True)
    residual = jnp.where(is_left, residual, target)
    replacements = draw(jnp.log(residual), replace_keys)
    return Verdict(jnp.where(is_accepted, drafts, replacements), is_accepted)


def draw(scores: Float[Array, "B V"], keys: Key[Array, "B"]) -> Int[Array, "B"]:
    """A token per row from softmax(scores): `jax.random.categorical` with a faster argmax."""
    noise = jax.vmap(lambda key: jax.random.gumbel(key, scores.shape[1:]))(keys)
    return argmax(scores + noise)


def stream_keys(row_keys: Key[Array, "B"], history: History, stream: int) -> Key[Array, "B"]:
    """The keys of one stream for the tokens that come next.

    They depend on a row's key and on its length. So rows do not influence each other, and it does
    not matter how often the place was drafted before in vain: those drafts were dropped for what
    came before them, and their numbers decided nothing.
    """

    def derive(key: jax.Array, length: jax.Array) -> jax.Array:
        return jax.random.fold_in(jax.random.fold_in(key, length), stream)

    return jax.vmap(derive)(row_keys, history.lengths)
