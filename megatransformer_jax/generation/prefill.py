"""Reads prompts into a cache, in one pass or in chunks.

Mostly it does not matter how a prompt is cut into passes. It does in two cases, in which all
prompts are cut in one way, so that a text does not depend on others in its batch, nor on whether it
is in a batch of `generation.continuous`:

- An exit criterion that needs logits would judge a token by a coda that sees its neighbours in the
  middle of their iterations. So all tokens but the last make all `depth` iterations, and the last
  one passes alone.
- With fewer cache slots than iterations, tokens of one pass see each other at the same iteration,
  and those of earlier passes at whichever iteration came last into the slot. So a prompt's last
  token passes alone, and if chunks are asked for, they begin at the prompt's start. (In one pass,
  which is the default, a prompt loses less by sharing slots.)
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int, Key

from megatransformer_jax.generation.history import NO_TOKEN, History
from megatransformer_jax.generation.placement import constrain_rows
from megatransformer_jax.models.exit_criteria import DepthRule, exit_criterion
from megatransformer_jax.models.megatransformer import MegaTransformer
from megatransformer_jax.models.passes.cached import NewTokens, cached_forward
from megatransformer_jax.nn.kv_cache import KVCache, repeat_sequences


@struct.dataclass
class Prefilled:
    """What decoding starts from.

    Attributes:
      cache: with all prompts.
      logits: of the token behind each prompt.
      core_state: the core's last state at each prompt's last token, [B, 1, state width].
      num_steps: iterations of each prompt's last token.
    """

    cache: KVCache
    logits: Float[Array, "B V"]
    core_state: Float[Array, "B 1 D"]
    num_steps: Int[Array, "B"]


def prefill(
    model: MegaTransformer,
    params: Any,
    prompts: NewTokens,
    cache: KVCache,
    rule: DepthRule,
    *,
    chunk: int | None = None,
    is_cut_alike: bool = False,
) -> Prefilled:
    """Passes the prompts through the model.

    Args:
      model: the model.
      params: its parameters.
      prompts: rows with their last place in the last column, see `left_padded`.
      cache: empty, with room for the columns.
      rule: how deep.
      chunk: columns per pass. None: all in one.
      is_cut_alike: cuts every prompt from its start, with its last token alone. A criterion that
        needs logits implies it.
    """
    if is_cut_alike or rule.criterion.needs_logits:
        return _cut_alike(model, params, prompts, cache, rule, chunk)
    num_columns = prompts.tokens.shape[1]
    size = num_columns if chunk is None else min(chunk, num_columns)
    # The first pass takes the odd columns, so that all others are of one size.
    starts = [0, *range(num_columns % size or size, num_columns, size)]
    prefilled = None
    for start, end in zip(starts, [*starts[1:], num_columns], strict=True):
        part = prompts
        if len(starts) > 1:
            columns = (prompts.tokens, prompts.is_token, prompts.inserted)
            part = NewTokens(*_columns(columns, start, end - start))
        part = part.replace(  # type: ignore[attr-defined]
            state_keys=prompts.state_keys, is_first=start == 0
        )
        prefilled = _pass(model, params, part, cache, rule)
        cache = prefilled.cache
    assert prefilled is not None
    return prefilled


def _cut_alike(
    model: MegaTransformer,
    params: Any,
    prompts: NewTokens,
    cache: KVCache,
    rule: DepthRule,
    chunk: int | None,
) -> Prefilled:
    before, last = _split_last(prompts)
    of_prompt: Any = rule
    if rule.criterion.needs_logits:
        of_prompt = of_prompt.replace(criterion=exit_criterion("fixed"))
    num_columns, keys = before.tokens.shape[1], prompts.state_keys
    chunk = chunk or num_columns
    for start in range(0, num_columns, chunk):
        columns = (before.tokens, before.is_token, before.inserted)
        part: Any = NewTokens(*_columns(columns, start, min(chunk, num_columns - start)))
        new = part.replace(state_keys=keys, is_first=start == 0)
        cache = _pass(model, params, new, cache, of_prompt).cache
    final: Any = last
    final = final.replace(state_keys=keys, is_first=num_columns == 0)
    return _pass(model, params, final, cache, rule)


@jax.jit
def _split_last(prompts: NewTokens) -> tuple[NewTokens, NewTokens]:
    """Prompts with their first token in the first column, without the last; and that one."""
    arrays = (prompts.tokens, prompts.is_token, prompts.inserted)
    num_columns = prompts.tokens.shape[1]
    offset = num_columns - jnp.sum(prompts.is_token, axis=1, dtype=jnp.int32)
    columns = jnp.arange(num_columns - 1) + offset[:, None]
    is_before = columns < num_columns - 1

    def move(array: jax.Array) -> jax.Array:
        index = jnp.minimum(columns, num_columns - 1)
        return jnp.take_along_axis(array, index.reshape(*index.shape, *(1,) * (array.ndim - 2)), 1)

    tokens, is_token, inserted = jax.tree.map(move, arrays)
    before = NewTokens(tokens, is_token & is_before, inserted)
    return before, NewTokens(*jax.tree.map(lambda array: array[:, -1:], arrays))


def repeat_rows(prefilled: Prefilled, count: int) -> Prefilled:
    """Each row `count` times, next to each other: the texts of one prompt, which is read once."""
    return Prefilled(
        repeat_sequences(prefilled.cache, count),
        jnp.repeat(prefilled.logits, count, axis=0),
        jnp.repeat(prefilled.core_state, count, axis=0),
        jnp.repeat(prefilled.num_steps, count, axis=0),
    )


@functools.partial(jax.jit, static_argnums=0, donate_argnames=("cache",))
def _pass(
    model: MegaTransformer, params: Any, new: NewTokens, cache: KVCache, rule: DepthRule
) -> Prefilled:
    output = cached_forward(model, params, new, cache, rule, last_logits_only=True)
    results = (output.logits[:, 0], output.state[:, -1:], output.num_steps[:, -1])
    return Prefilled(output.cache, *constrain_rows(model.sharder, results))


@functools.partial(jax.jit, static_argnames="num_columns")
def left_padded(
    history: History, state_keys: Key[Array, "B"] | None, num_columns: int
) -> NewTokens:
    """The prompts, each one's last token in the last column.

    Prompts of any length up to `num_columns` share one compilation.

    Args:
      history: the prompts; nothing generated yet.
      state_keys: see `NewTokens`.
      num_columns: at least the longest prompt; static.
    """
    tokens = history.suffix(num_columns)
    is_token = tokens != NO_TOKEN
    return NewTokens(jnp.where(is_token, tokens, 0), is_token, state_keys=state_keys)


@functools.partial(jax.jit, static_argnums=2)
def _columns(arrays: Any, start: Int[Array, ""] | int, size: int) -> Any:
    """A chunk, wherever it starts: a slice as such recompiles for each place."""
    cut = functools.partial(jax.lax.dynamic_slice_in_dim, slice_size=size, axis=1)
    return jax.tree.map(lambda array: cut(array, start), arrays)
