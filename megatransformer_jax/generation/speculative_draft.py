"""Drafts tokens with few iterations of the core.

A draft needs no cache of its own. In a full cache every iteration has its own slot, so a shallow
pass reads what the first iterations of the full passes have left there, and of the drafted tokens
what the shallow passes have just written behind it. Those rows are dropped before the verification.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from megatransformer_jax.generation.argmax import argmax
from megatransformer_jax.generation.decode_loop import DecodeSettings, DecodeState
from megatransformer_jax.generation.ending import EndState, exhaust
from megatransformer_jax.generation.history import History
from megatransformer_jax.generation.placement import constrain_rows
from megatransformer_jax.generation.processors.chain import (
    apply_chain,
    is_exhausted,
    update_chain,
)
from megatransformer_jax.generation.speculative_acceptance import DRAFT, draw, stream_keys
from megatransformer_jax.models.cached_forward import cached_forward
from megatransformer_jax.models.megatransformer import MegaTransformer
from megatransformer_jax.nn.kv_cache import KVCache, drop_rows


@struct.dataclass
class Drafts:
    """Drafted tokens of one round.

    Attributes:
      tokens: int32 [B, K].
      is_drafted: bool [B, K], in each row a first part.
      scores: float32 [K, B, V], what they were drawn from, after the logits processors; None if the
        likeliest were taken.
    """

    tokens: Any
    is_drafted: Any
    scores: Any


@struct.dataclass
class _Carry:
    cache: KVCache
    history: History
    chain_states: tuple[Any, ...]
    end: EndState


def draft(
    model: MegaTransformer,
    params: Any,
    settings: DecodeSettings,
    state: DecodeState,
    draft_depth: jax.Array,
    draft_length: int,
) -> tuple[Drafts, KVCache]:
    """Continues each running row by up to `draft_length` tokens.

    A row stops where its draft ends the text, and one token before its limit of new tokens, since
    a verification adds one token to the drafts.

    Returns:
      The drafts; and the cache, which remembers nothing of them.
    """
    depth = jnp.minimum(draft_depth, settings.rule.depth)
    rule = settings.rule.replace(depth=depth)  # type: ignore[attr-defined]

    def add_one(carry: _Carry, _: None) -> tuple[_Carry, tuple[jax.Array, ...]]:
        has_room = carry.history.num_generated + 1 < settings.ending.max_new_tokens
        goes_on = carry.end.is_running & has_room
        output = cached_forward(
            model,
            params,
            carry.history.suffix(1),
            goes_on[:, None],
            carry.cache,
            rule,
            state_keys=settings.row_keys,
        )
        logits = constrain_rows(settings.sharder, output.logits[:, 0])
        scores = apply_chain(settings.chain, carry.chain_states, carry.history, logits)
        if settings.is_drawn:
            tokens = draw(scores, stream_keys(settings.row_keys, carry.history, DRAFT))
        else:
            tokens = argmax(scores)
        end = exhaust(carry.end, is_exhausted(scores))
        is_drafted = goes_on & end.is_running
        history = carry.history.append(tokens, is_drafted)
        carry = _Carry(
            output.cache,
            history,
            update_chain(settings.chain, carry.chain_states, history, tokens),
            settings.ending.update(end, tokens, history.num_generated),
        )
        drafted = (tokens, is_drafted)
        return carry, (*drafted, scores) if settings.is_drawn else drafted

    carry = _Carry(state.cache, state.history, state.chain_states, state.end)
    carry, (tokens, is_drafted, *scores) = jax.lax.scan(add_one, carry, length=draft_length)
    cache = drop_rows(carry.cache, jnp.zeros(tokens.T.shape, bool))
    return Drafts(tokens.T, is_drafted.T, scores[0] if scores else None), cache
