"""Chooses the next token of each row from its scores."""

import typing

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from megatransformer_jax.generation.history import NO_TOKEN, History
from megatransformer_jax.generation.processors.processor import (
    Chain,
    apply_chain,
    argmax,
    is_exhausted,
)


class Choice(typing.NamedTuple):
    """Chosen tokens.

    Attributes:
      tokens: int32 [B]; of an exhausted row without meaning.
      log_probs: float32 [B], under the model's own distribution, before the chain.
      is_exhausted: bool [B], rows in which the chain bans every token.
    """

    tokens: jax.Array
    log_probs: jax.Array
    is_exhausted: jax.Array


def choose(
    chain: Chain,
    chain_states: tuple[typing.Any, ...],
    history: History,
    logits: Float[Array, "B V"],
    row_keys: Key[Array, "B"],
    *,
    is_drawn: bool | jax.Array,
) -> Choice:
    """Draws, or takes the likeliest, of what the chain leaves.

    Args:
      chain: logits processors.
      chain_states: theirs.
      history: tokens so far. A row's draw depends on its key and on its length alone, so rows do
        not influence each other and a text can be continued as if it had not been interrupted.
      logits: of the model.
      row_keys: one per row.
      is_drawn: static, or bool [B] if it differs between rows. Rows that are not drawn must then
        have a temperature of 0 in the chain.
    """
    scores = apply_chain(chain, chain_states, history, logits)

    def draw() -> jax.Array:
        keys = jax.vmap(jax.random.fold_in)(row_keys, history.lengths)
        # A draw by the Gumbel trick, as `jax.random.categorical`, with a faster argmax.
        noise = jax.vmap(lambda key: jax.random.gumbel(key, scores.shape[1:]))(keys)
        return argmax(scores + noise)

    if isinstance(is_drawn, bool):
        tokens = draw() if is_drawn else argmax(scores)
    else:
        # Noise for a whole vocabulary takes time, and changes no row with a single token left.
        tokens = jax.lax.cond(jnp.any(is_drawn), draw, lambda: argmax(scores))
    return Choice(tokens, token_log_probs(logits, tokens), is_exhausted(scores))


def token_log_probs(logits: Float[Array, "B V"], tokens: Int[Array, "B"]) -> Float[Array, "B"]:
    """Log-probability of one token per row."""
    chosen = jnp.take_along_axis(logits, tokens[:, None], axis=1)[:, 0]
    return chosen - jax.nn.logsumexp(logits, axis=-1)


def top_log_probs(
    logits: Float[Array, "B V"], wanted: Int[Array, "B"], num_top: int
) -> tuple[Int[Array, "B {num_top}"], Float[Array, "B {num_top}"]]:
    """The likeliest tokens of each row and their log-probabilities, likeliest first.

    Of equally likely tokens the one with the lowest id comes first. Nothing is computed if no row
    wants any.

    Args:
      logits: of the model.
      wanted: tokens that each row wants, at most `num_top`.
      num_top: static.

    Returns:
      Ids and log-probabilities, as many for every row; NO_TOKEN and 0 if no row wants any.
    """
    shape, count = (logits.shape[0], num_top), min(num_top, logits.shape[1])

    def search() -> tuple[jax.Array, jax.Array]:
        top, ids = jax.lax.top_k(logits, count)
        log_probs = top - jax.nn.logsumexp(logits, axis=-1, keepdims=True)
        behind = ((0, 0), (0, num_top - count))
        return (
            jnp.pad(ids.astype(jnp.int32), behind, constant_values=NO_TOKEN),
            jnp.pad(log_probs, behind),
        )

    def skip() -> tuple[jax.Array, jax.Array]:
        return jnp.full(shape, NO_TOKEN, jnp.int32), jnp.zeros(shape, logits.dtype)

    found: tuple[jax.Array, jax.Array] = jax.lax.cond(jnp.any(wanted > 0), search, skip)
    return found
