"""Chooses the next token of each row from its scores."""

import typing

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from megatransformer_jax.generation.history import History
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
    is_drawn: bool,
) -> Choice:
    """Draws, or takes the likeliest, of what the chain leaves.

    Args:
      chain: logits processors.
      chain_states: theirs.
      history: tokens so far. A row's draw depends on its key and on its length alone, so rows do
        not influence each other and a text can be continued as if it had not been interrupted.
      logits: of the model.
      row_keys: one per row.
      is_drawn: static.
    """
    scores = apply_chain(chain, chain_states, history, logits)
    if is_drawn:
        keys = jax.vmap(jax.random.fold_in)(row_keys, history.lengths)
        # A draw by the Gumbel trick, as `jax.random.categorical`, with a faster argmax.
        noise = jax.vmap(lambda key: jax.random.gumbel(key, scores.shape[1:]))(keys)
        tokens = argmax(scores + noise)
    else:
        tokens = argmax(scores)
    return Choice(tokens, token_log_probs(logits, tokens), is_exhausted(scores))


def token_log_probs(logits: Float[Array, "B V"], tokens: Int[Array, "B"]) -> Float[Array, "B"]:
    """Log-probability of one token per row."""
    chosen = jnp.take_along_axis(logits, tokens[:, None], axis=1)[:, 0]
    return chosen - jax.nn.logsumexp(logits, axis=-1)
