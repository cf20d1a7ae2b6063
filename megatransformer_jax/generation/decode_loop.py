"""Decoding token by token, greedy or by draws: one compiled loop over a cache.

Everything that a request may change is data: depth, thresholds, the numbers of the logits
processors, the most tokens, the stop texts of one size of automaton. Structure is what compiles
recompiles: the model, batch size, capacity, which processors there are, the exit criterion.

    settings = DecodeSettings(rule, chain, ending, row_keys)
    state = start(settings, prefilled, history)
    state = decode(model, params, settings, state, jnp.int32(64))    # as often as wanted
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool

from megatransformer_jax.generation.endings import END_OF_TEXT, Ending, EndState, exhaust
from megatransformer_jax.generation.history import History, put_in_rows
from megatransformer_jax.generation.placement import constrain_rows
from megatransformer_jax.generation.prefill import Prefilled
from megatransformer_jax.generation.processors.processor import Chain, init_chain, update_chain
from megatransformer_jax.generation.token_choice import choose
from megatransformer_jax.models.exit_criteria import DepthRule
from megatransformer_jax.models.megatransformer import MegaTransformer, gather_weights
from megatransformer_jax.models.passes.cached import NewTokens, cached_forward
from megatransformer_jax.nn.kv_cache import KVCache
from megatransformer_jax.sharding.rules import Sharder


@struct.dataclass
class DecodeSettings:
    """What stays the same from token to token.

    Attributes:
      rule: how deep tokens go.
      chain: logits processors.
      ending: what ends a row.
      row_keys: key [B], of a row's draws and of its tokens' first states.
      is_drawn: tokens are drawn; otherwise the likeliest is taken.
      warm_start: a token's first state is the last one of the token before (continuous compute,
        arXiv 2502.05171, section 6.3); otherwise `recurrence.state_init`.
      sharder: that of the model, which suits the rows.
    """

    rule: DepthRule
    chain: Chain
    ending: Ending
    row_keys: Any
    is_drawn: bool = struct.field(pytree_node=False, default=False)
    warm_start: bool = struct.field(pytree_node=False, default=False)
    sharder: Sharder = struct.field(pytree_node=False, default=Sharder())


@struct.dataclass
class DecodeState:
    """What changes from token to token.

    The last token of a running row is in the history, but not in the cache yet.

    Attributes:
      cache: keys and values of all tokens but the last.
      history: all tokens.
      core_state: the core's last state at the newest token of the cache, [B, 1, state width].
      chain_states: of the logits processors.
      end: which rows have ended, and why.
      steps: int32 [B, C], in the history's columns: iterations of the pass that led to a generated
        token; 0 in the prompt.
      scores: float32 [B], sum of the new tokens' log-probabilities under the model.
    """

    cache: KVCache
    history: History
    core_state: Any
    chain_states: tuple[Any, ...]
    end: EndState
    steps: Any
    scores: Any


@jax.jit
def start(
    settings: DecodeSettings,
    prefilled: Prefilled,
    history: History,
    is_waiting: Bool[Array, "B"] | None = None,
) -> DecodeState:
    """The state once each row has its first new token.

    Args:
      settings: of the whole generation.
      prefilled: the prompts' cache.
      history: the prompts, with room for the new tokens.
      is_waiting: rows whose prompt asks for a medium by its last token, which the cache does not
        have; they get no token yet. None: there are none.
    """
    batch_size = history.tokens.shape[0]
    end = settings.ending.init(batch_size)
    if is_waiting is not None:
        end = EndState(jnp.where(is_waiting, END_OF_TEXT, end.reason), end.stop_state)
    state = DecodeState(
        cache=prefilled.cache,
        history=history,
        core_state=prefilled.core_state,
        chain_states=init_chain(settings.chain, history),
        end=end,
        steps=jnp.zeros(history.tokens.shape, jnp.int32),
        scores=jnp.zeros((batch_size,), jnp.float32),
    )
    return _add_token(settings, state, prefilled.logits, prefilled.num_steps)


@functools.partial(jax.jit, static_argnums=0, donate_argnames=("state",))
def decode(
    model: MegaTransformer,
    params: Any,
    settings: DecodeSettings,
    state: DecodeState,
    max_tokens: jax.Array,
) -> DecodeState:
    """Adds up to `max_tokens` tokens to each running row; ends when none is running.

    Args:
      model: static.
      params: parameters.
      settings: of the whole generation.
      state: donated.
      max_tokens: int32 [], of this call.
    """
    params = gather_weights(model, params)

    def goes_on(carry: tuple[jax.Array, DecodeState]) -> jax.Array:
        count, state = carry
        return (count < max_tokens) & jnp.any(state.end.is_running)

    def add_one(carry: tuple[jax.Array, DecodeState]) -> tuple[jax.Array, DecodeState]:
        count, state = carry
        return count + 1, _step(model, params, settings, state)

    return jax.lax.while_loop(goes_on, add_one, (jnp.int32(0), state))[1]


def _step(
    model: MegaTransformer, params: Any, settings: DecodeSettings, state: DecodeState
) -> DecodeState:
    """Passes each running row's last token through the model and chooses the next."""
    new = NewTokens(
        state.history.suffix(1),
        state.end.is_running[:, None],
        state=state.core_state if settings.warm_start else None,
        state_keys=settings.row_keys,
    )
    output = cached_forward(model, params, new, state.cache, settings.rule)
    state = state.replace(cache=output.cache, core_state=output.state)  # type: ignore[attr-defined]
    return _add_token(settings, state, output.logits[:, 0], output.num_steps[:, 0])


def _add_token(
    settings: DecodeSettings, state: DecodeState, logits: jax.Array, num_steps: jax.Array
) -> DecodeState:
    # Every processor would gather the vocabulary, so it is whole from here on.
    logits = constrain_rows(settings.sharder, logits)
    choice = choose(
        settings.chain,
        state.chain_states,
        state.history,
        logits,
        settings.row_keys,
        is_drawn=settings.is_drawn,
    )
    end = exhaust(state.end, choice.is_exhausted)
    is_added = end.is_running
    history = state.history.append(choice.tokens, is_added)
    column = jnp.where(is_added, state.history.lengths, history.capacity)
    changes = {
        "history": history,
        "chain_states": update_chain(settings.chain, state.chain_states, history, choice.tokens),
        "end": settings.ending.update(end, choice.tokens, history.num_generated),
        "steps": put_in_rows(state.steps, column, num_steps),
        "scores": state.scores + jnp.where(is_added, choice.log_probs, 0.0),
    }
    added: Any = state.replace(  # type: ignore[attr-defined]
        **constrain_rows(settings.sharder, changes)
    )
    return added
