"""Verifies drafts: one pass at full depth over all of them, then token by token what comes of it.

The pass gives the model's scores behind the last token and behind each draft. They go through the
logits processors in order, as in `decode_loop`: each sees the history and the state behind the
drafts that were accepted before. A row leaves at its first rejected draft, with the replacement; at
the end of its drafts, with one more token; or where its text ends. So nothing has to be rolled back
but the cache.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from megatransformer_jax.generation.argmax import argmax
from megatransformer_jax.generation.decode_loop import DecodeSettings, DecodeState
from megatransformer_jax.generation.ending import exhaust
from megatransformer_jax.generation.history import put_in_rows
from megatransformer_jax.generation.placement import constrain_rows
from megatransformer_jax.generation.processors.chain import (
    apply_chain,
    is_exhausted,
    update_chain,
)
from megatransformer_jax.generation.speculative_acceptance import (
    ACCEPT,
    REPLACE,
    Verdict,
    judge,
    stream_keys,
)
from megatransformer_jax.generation.speculative_draft import Drafts
from megatransformer_jax.generation.token_choice import token_log_probs
from megatransformer_jax.models.cached_forward import CachedOutput, cached_forward
from megatransformer_jax.models.megatransformer import MegaTransformer
from megatransformer_jax.nn.cache_rows import keep_rows


@struct.dataclass
class Verified:
    """What a round adds.

    Attributes:
      state: with the new tokens.
      num_added: new tokens of each row.
      num_accepted: how many of them were drafted.
    """

    state: DecodeState
    num_added: Int[Array, "B"]
    num_accepted: Int[Array, "B"]


@struct.dataclass
class _Carry:
    column: jax.Array
    is_live: jax.Array  # Rows whose drafts have all been accepted so far.
    verified: Verified


def verify(
    model: MegaTransformer,
    params: Any,
    settings: DecodeSettings,
    state: DecodeState,
    drafts: Drafts,
    ends: Int[Array, "B"],
) -> Verified:
    """Adds the accepted drafts and one token more to each running row.

    Args:
      model: the model.
      params: its parameters.
      settings: of the whole generation.
      state: before the drafts.
      drafts: of all rows.
      ends: `sequence_ends` of the cache.
    """
    was_running = state.end.is_running
    output = cached_forward(
        model,
        params,
        jnp.concatenate((state.history.suffix(1), drafts.tokens), axis=1),
        jnp.concatenate((was_running[:, None], drafts.is_drafted), axis=1),
        state.cache,
        settings.rule,
        state_keys=settings.row_keys,
    )
    logits = constrain_rows(settings.sharder, output.logits)
    # Behind the last draft there is none to be judged.
    drafts = Drafts(
        jnp.pad(drafts.tokens, ((0, 0), (0, 1))),
        jnp.pad(drafts.is_drafted, ((0, 0), (0, 1))),
        drafts.scores,
    )
    num_columns = logits.shape[1]
    nothing = jnp.zeros_like(ends)
    state = state.replace(cache=output.cache)  # type: ignore[attr-defined]
    carry = jax.lax.while_loop(
        lambda carry: (carry.column < num_columns) & jnp.any(carry.is_live),
        lambda carry: _add_token(settings, logits, output.num_steps, drafts, carry),
        _Carry(jnp.int32(0), was_running, Verified(state, nothing, nothing)),
    )
    verified: Any = carry.verified
    num_added = verified.num_added
    state = verified.state.replace(
        cache=keep_rows(verified.state.cache, ends, num_added, num_columns, settings.sharder),
        core_state=_last_state(output, state.core_state, num_added),
    )
    replaced: Verified = verified.replace(state=state)
    return replaced


def _add_token(
    settings: DecodeSettings,
    all_logits: Float[Array, "B T V"],
    all_steps: Int[Array, "B T"],
    drafts: Drafts,
    carry: _Carry,
) -> _Carry:
    """Judges one column: its draft, or a token instead of it, is added to the live rows."""
    state = carry.verified.state
    logits, num_steps, tokens, is_drafted = (
        jax.lax.dynamic_index_in_dim(array, carry.column, axis=1, keepdims=False)
        for array in (all_logits, all_steps, drafts.tokens, drafts.is_drafted)
    )
    scores = apply_chain(settings.chain, state.chain_states, state.history, logits)
    if settings.is_drawn:
        # The index stays at the last scores where there are none and no draft either.
        draft_scores = jax.lax.dynamic_index_in_dim(drafts.scores, carry.column, keepdims=False)
        keys = [
            stream_keys(settings.row_keys, state.history, stream) for stream in (ACCEPT, REPLACE)
        ]
        tokens, is_accepted = judge(scores, draft_scores, tokens, is_drafted, *keys)
    else:
        likeliest = argmax(scores)
        tokens, is_accepted = Verdict(likeliest, is_drafted & (likeliest == tokens))

    end = exhaust(state.end, is_exhausted(scores) & carry.is_live)
    is_added = carry.is_live & end.is_running
    history = state.history.append(tokens, is_added)
    chain_states = update_chain(settings.chain, state.chain_states, history, tokens)
    new_end = settings.ending.update(end, tokens, history.num_generated)
    end = _where_rows(is_added, new_end, end)
    changes = {
        "history": history,
        "chain_states": _where_rows(is_added, chain_states, state.chain_states),
        "end": end,
        "steps": put_in_rows(
            state.steps, jnp.where(is_added, state.history.lengths, history.capacity), num_steps
        ),
        "scores": state.scores + jnp.where(is_added, token_log_probs(logits, tokens), 0.0),
    }
    changed: Any = state
    verified = Verified(
        changed.replace(**constrain_rows(settings.sharder, changes)),
        carry.verified.num_added + is_added,
        carry.verified.num_accepted + (is_added & is_accepted),
    )
    return _Carry(carry.column + 1, is_added & is_accepted & end.is_running, verified)


def _where_rows(is_new: Bool[Array, "B"], new: Any, old: Any) -> Any:
    """Of trees whose every leaf begins with [B], the rows of one or of the other."""

    def choose(new: jax.Array, old: jax.Array) -> jax.Array:
        return jnp.where(is_new.reshape(-1, *(1,) * (old.ndim - 1)), new, old)

    return jax.tree.map(choose, new, old)


def _last_state(
    output: CachedOutput, before: Float[Array, "B 1 D"], num_added: Int[Array, "B"]
) -> Float[Array, "B 1 D"]:
    """The core's state at the newest token that stays in the cache."""
    last = jnp.maximum(num_added - 1, 0)[:, None, None]
    state = jnp.take_along_axis(output.state, last, axis=1)
    return jnp.where((num_added > 0)[:, None, None], state, before)
