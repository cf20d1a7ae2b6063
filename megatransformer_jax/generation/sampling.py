"""Continues prompts by sampling, recomputing the whole row for every token.

No cache: the cost of a token grows with the row. That suits short samples during training; the
shapes are static and everything runs in one compiled loop.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from megatransformer_jax.config.option import UserError
from megatransformer_jax.data.tokenizer import Tokenizer
from megatransformer_jax.models.megatransformer import MegaTransformer, off_mesh


def sample_text(
    model: MegaTransformer,
    params: Any,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    *,
    num_steps: int,
    max_new_tokens: int,
    temperature: float,
    key: Key[Array, ""],
) -> list[str]:
    """Continues each prompt until the end-of-text token or `max_new_tokens`.

    Args:
      model: the model.
      params: its parameters.
      tokenizer: turns prompts into ids (after its bos) and ids into text.
      prompts: at least one.
      num_steps: iterations of the core for every token.
      max_new_tokens: most tokens added.
      temperature: 0 is greedy.
      key: randomness of the draws and of the core's first state.

    Returns:
      Prompt and continuation, one text per prompt.

    Raises:
      UserError: if there is no prompt, or one with its continuation exceeds `max_length`.
    """
    if not prompts:
        raise UserError("there is no prompt to continue; give at least one.")
    ids = [[tokenizer.bos_id, *tokenizer.encode(prompt)] for prompt in prompts]
    longest = max(map(len, ids))
    if longest + max_new_tokens > model.config.max_length:
        raise UserError(
            f"the longest prompt has {longest} tokens; with {max_new_tokens} new ones it exceeds "
            f"model.max_length={model.config.max_length}. Shorten it or lower max_new_tokens."
        )
    tokens = np.full((len(ids), longest + max_new_tokens), tokenizer.pad_id, np.int32)
    for row, prompt_ids in enumerate(ids):
        tokens[row, : len(prompt_ids)] = prompt_ids
    lengths = np.array([len(prompt_ids) for prompt_ids in ids], np.int32)
    ids_of_model = np.arange(model.config.vocab_size)
    filled = sample_tokens(
        model,
        params,
        tokens,
        lengths,
        np.int32(num_steps),
        np.int32(max_new_tokens),
        np.float32(temperature),
        key,
        # The model may have more rows than the tokenizer has ids, and padding is not text.
        (ids_of_model < tokenizer.vocab_size) & (ids_of_model != tokenizer.pad_id),
    )
    rows = np.asarray(jax.device_get(filled))
    pairs = zip(rows, lengths.tolist(), strict=True)
    return [_read(tokenizer, row, length, max_new_tokens) for row, length in pairs]


@functools.partial(jax.jit, static_argnums=0)
def sample_tokens(
    model: MegaTransformer,
    params: Any,
    tokens: Int[Array, "B T"],
    lengths: Int[Array, "B"],
    num_steps: Int[Array, ""],
    max_new_tokens: Int[Array, ""],
    temperature: Float[Array, ""],
    key: Key[Array, ""],
    allowed: Bool[Array, "V"] | None = None,
) -> Int[Array, "B T"]:
    """Fills each row behind its prompt with `max_new_tokens` sampled tokens.

    Args:
      model: static.
      params: parameters.
      tokens: prompts, padded on the right to the capacity T.
      lengths: tokens of each prompt, at least 1; with max_new_tokens at most T.
      num_steps: iterations of the core.
      max_new_tokens: tokens to add per row.
      temperature: 0 is greedy.
      key: randomness; a row's first state is the same for every token.
      allowed: tokens that may be added. None: all of the model's vocabulary.

    Returns:
      The filled rows.
    """
    # A few short prompts need not divide by the mesh nor fit a fused kernel's blocks: only the
    # parameters are laid out on the mesh.
    unconstrained = off_mesh(model)
    state_key, draw_key = jax.random.split(key)
    rows = jnp.arange(tokens.shape[0])

    def add_token(index: jax.Array, tokens: jax.Array) -> jax.Array:
        output: Any = unconstrained.apply(
            {"params": params}, tokens, num_steps=num_steps, rngs={"state": state_key}
        )
        # What comes after `last` cannot be seen from it: attention is causal.
        last = lengths + index - 1
        logits = output.logits[rows, last]
        if allowed is not None:
            logits = jnp.where(allowed, logits, -jnp.inf)
        drawn = jax.random.categorical(
            jax.random.fold_in(draw_key, index), logits / jnp.maximum(temperature, 1e-6)
        )
        chosen = jnp.where(temperature > 0, drawn, jnp.argmax(logits, axis=-1))
        return tokens.at[rows, last + 1].set(chosen.astype(tokens.dtype))

    filled = jax.lax.fori_loop(0, max_new_tokens, add_token, tokens)
    return model.sharder.constrain(filled, None, None)


def _read(tokenizer: Tokenizer, row: np.ndarray, length: int, max_new_tokens: int) -> str:
    """Text of a filled row up to its end-of-text token, without the bos."""
    ids = row[1 : length + max_new_tokens].tolist()
    prompt, added = ids[: length - 1], ids[length - 1 :]
    if tokenizer.eos_id in added:
        added = added[: added.index(tokenizer.eos_id)]
    return tokenizer.decode(prompt + added)
