"""Reads prompts into a cache, in one pass or in chunks."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int, Key

from megatransformer_jax.generation.history import NO_TOKEN, History
from megatransformer_jax.generation.placement import constrain_rows
from megatransformer_jax.models.megatransformer import MegaTransformer
from megatransformer_jax.models.passes.cached import Inserted, cached_forward
from megatransformer_jax.models.passes.depth_loop import DepthRule
from megatransformer_jax.nn.kv_cache import KVCache, repeat_sequences


@struct.dataclass
class Prefilled:
    """What decoding starts from.

    Attributes:
      cache: with all prompts.
      logits: of the token behind each prompt.
      core_state: the core's last state at each prompt's last token, [B, 1, core width].
      num_steps: iterations of each prompt's last token.
    """

    cache: KVCache
    logits: Float[Array, "B V"]
    core_state: Float[Array, "B 1 D"]
    num_steps: Int[Array, "B"]


def prefill(
    model: MegaTransformer,
    params: Any,
    history: History,
    cache: KVCache,
    rule: DepthRule,
    state_keys: Key[Array, "B"] | None,
    *,
    num_columns: int,
    chunk: int | None = None,
) -> Prefilled:
    """Passes the prompts through the model.

    They are padded on the left to `num_columns`, so that each one's last token is in the last
    column; prompts of any length up to that share one compilation.

    Args:
      model: the model.
      params: its parameters.
      history: the prompts; nothing generated yet.
      cache: empty, with room for the columns.
      rule: how deep.
      state_keys: see `cached_forward`.
      num_columns: at least the longest prompt.
      chunk: columns per pass. None: all in one.
    """
    tokens, is_token = _left_padded(history, num_columns)
    return prefill_columns(model, params, tokens, is_token, cache, rule, state_keys, chunk=chunk)


def prefill_columns(
    model: MegaTransformer,
    params: Any,
    tokens: Int[Array, "B T"],
    is_token: Bool[Array, "B T"],
    cache: KVCache,
    rule: DepthRule,
    state_keys: Key[Array, "B"] | None,
    *,
    chunk: int | None,
    inserted: Inserted | None = None,
) -> Prefilled:
    """As `prefill`, of rows that have their last place in the last column.

    Args:
      model: the model.
      params: its parameters.
      tokens: ids.
      is_token: False for padding.
      cache: empty, with room for the columns.
      rule: how deep.
      state_keys: see `cached_forward`.
      chunk: columns per pass. None: all in one.
      inserted: media among the tokens, see `cached_forward`.
    """
    num_columns = tokens.shape[1]
    size = num_columns if chunk is None else min(chunk, num_columns)
    # The first pass takes the odd columns, so that all others are of one size.
    starts = [0, *range(num_columns % size or size, num_columns, size)]
    prefilled = None
    for start, end in zip(starts, [*starts[1:], num_columns], strict=True):
        prefilled = _pass(
            model,
            params,
            *_columns((tokens, is_token, inserted), start, end - start),
            cache,
            rule,
            state_keys,
            is_first=start == 0,
        )
        cache = prefilled.cache
    assert prefilled is not None
    return prefilled


def repeat_rows(prefilled: Prefilled, count: int) -> Prefilled:
    """Each row `count` times, next to each other: the texts of one prompt, which is read once."""
    return Prefilled(
        repeat_sequences(prefilled.cache, count),
        jnp.repeat(prefilled.logits, count, axis=0),
        jnp.repeat(prefilled.core_state, count, axis=0),
        jnp.repeat(prefilled.num_steps, count, axis=0),
    )


@functools.partial(
    jax.jit, static_argnums=0, static_argnames=("is_first",), donate_argnames=("cache",)
)
def _pass(
    model: MegaTransformer,
    params: Any,
    tokens: Int[Array, "B T"],
    is_token: Bool[Array, "B T"],
    inserted: Inserted | None,
    cache: KVCache,
    rule: DepthRule,
    state_keys: Key[Array, "B"] | None,
    *,
    is_first: bool,
) -> Prefilled:
    output = cached_forward(
        model,
        params,
        tokens,
        is_token,
        cache,
        rule,
        state_keys=state_keys,
        is_first=is_first,
        last_logits_only=True,
        inserted=inserted,
    )
    results = (output.logits[:, 0], output.state[:, -1:], output.num_steps[:, -1])
    return Prefilled(output.cache, *constrain_rows(model.sharder, results))


@functools.partial(jax.jit, static_argnames="num_columns")
def _left_padded(history: History, num_columns: int) -> tuple[jax.Array, jax.Array]:
    """Tokens [B, num_columns], and a mask that is False at padding."""
    tokens = history.suffix(num_columns)
    is_token = tokens != NO_TOKEN
    return jnp.where(is_token, tokens, 0), is_token


@functools.partial(jax.jit, static_argnums=2)
def _columns(arrays: Any, start: Int[Array, ""] | int, size: int) -> Any:
    """A chunk, wherever it starts: a slice as such recompiles for each place."""
    cut = functools.partial(jax.lax.dynamic_slice_in_dim, slice_size=size, axis=1)
    return jax.tree.map(lambda array: cut(array, start), arrays)
