"""The compiled steps of generation with media: read prompts, make media, read them back."""

import functools
from typing import Any, cast

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from megatransformer_jax.generation.decode_loop import DecodeSettings, DecodeState
from megatransformer_jax.generation.ending import LENGTH, RUNNING, EndState
from megatransformer_jax.generation.history import History
from megatransformer_jax.generation.placement import constrain_rows
from megatransformer_jax.generation.prefill import Prefilled
from megatransformer_jax.generation.processors.chain import init_chain, update_chain
from megatransformer_jax.models.cached_forward import cached_forward
from megatransformer_jax.models.decoders.decoder import Condition
from megatransformer_jax.models.media_sequence import (
    MediaSequence,
    media_conditions,
    media_sequence,
    medium_of_slot,
    opened_medium,
)
from megatransformer_jax.models.megatransformer import MegaTransformer
from megatransformer_jax.types import AUDIO, IMAGE, MediaBatch


@functools.partial(jax.jit, static_argnums=0, static_argnames="num_columns")
def enter_prompts(
    model: MegaTransformer,
    params: Any,
    tokens: Int[Array, "B T"],
    lengths: Int[Array, "B"],
    media: MediaBatch,
    *,
    num_columns: int,
) -> MediaSequence:
    """`media_sequence`, compiled."""
    return media_sequence(model, params, tokens, lengths, media, num_columns)


@jax.jit
def begin(
    settings: DecodeSettings,
    prefilled: Prefilled,
    history: History,
    reasons: Int[Array, "B"],
) -> DecodeState:
    """The state before the first new token.

    Args:
      settings: of the whole generation.
      prefilled: all tokens but the last of each prompt.
      history: the whole prompts.
      reasons: END_OF_TEXT for rows that wait for a medium, else RUNNING.
    """
    end = settings.ending.init(history.tokens.shape[0])
    return DecodeState(
        cache=prefilled.cache,
        history=history,
        core_state=prefilled.core_state,
        chain_states=init_chain(settings.chain, history),
        end=EndState(reasons, end.stop_state),
        steps=jnp.zeros(history.tokens.shape, jnp.int32),
        scores=jnp.zeros(reasons.shape, jnp.float32),
    )


@functools.partial(jax.jit, static_argnums=0)
def conditions_of_openings(
    model: MegaTransformer,
    params: Any,
    tokens: Int[Array, "B T"],
    lengths: Int[Array, "B"],
    media: MediaBatch,
    slots: dict[str, Int[Array, "B"]],
    num_steps: Int[Array, ""],
    row_keys: Key[Array, "B"],
) -> dict[str, Condition]:
    """The condition of one slot of each row and kind, by 'image' and 'audio'."""
    conditions = media_conditions(model, params, tokens, lengths, media, num_steps, row_keys)
    return {kind: medium_of_slot(condition, slots[kind]) for kind, condition in conditions.items()}


@functools.partial(jax.jit, static_argnums=0, static_argnames="settings")
def draw_images(
    model: MegaTransformer,
    params: Any,
    condition: Condition,
    rows: Int[Array, "N"],
    keys: Key[Array, "N"],
    *,
    settings: Any,
) -> Float[Array, "N H W C"]:
    """Images of the named rows, in [-1, 1], each by its own key."""

    def draw(context: jax.Array, is_context: jax.Array, key: jax.Array) -> jax.Array:
        alone = Condition(context[None], is_context[None])
        image: Any = model.apply({"params": params}, alone, key, settings, method="sample_images")
        return cast(jax.Array, image[0])

    return jax.vmap(draw)(condition.context[rows], condition.is_context[rows], keys)


@functools.partial(jax.jit, static_argnums=0, static_argnames="settings")
def make_clips(
    model: MegaTransformer,
    params: Any,
    condition: Condition,
    rows: Int[Array, "N"],
    keys: Key[Array, "N"],
    *,
    settings: Any,
) -> tuple[Float[Array, "N F M"], Int[Array, "N"]]:
    """Spectrograms of the named rows and their frames, each by its own key."""

    def make(
        context: jax.Array, is_context: jax.Array, key: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        alone = Condition(context[None], is_context[None])
        clip: Any = model.apply(
            {"params": params}, alone, key, None, settings, method="sample_audio"
        )
        return clip[0][0], clip[1][0]

    return jax.vmap(make)(condition.context[rows], condition.is_context[rows], keys)


@functools.partial(jax.jit, static_argnums=0, donate_argnames="state")
def read_media(
    model: MegaTransformer,
    params: Any,
    settings: DecodeSettings,
    state: DecodeState,
    media: MediaBatch,
    closing: Int[Array, "B"],
) -> DecodeState:
    """Opening tokens and media enter the cache, closing tokens follow, and their rows go on.

    Args:
      model: the model.
      params: its parameters.
      settings: of the whole generation.
      state: rows with a medium end with its opening token; donated. The others do not change.
      media: one token and one slot per row.
      closing: tokens.
    """
    is_open = jnp.any((media.follows == IMAGE) | (media.follows == AUDIO), axis=1)
    opening = state.history.suffix(1)[:, 0]
    sequence = opened_medium(model, params, opening, is_open, media)
    output = cached_forward(
        model,
        params,
        sequence.tokens,
        sequence.is_token,
        state.cache,
        settings.rule,
        state_keys=settings.row_keys,
        last_logits_only=True,
        inserted=sequence.inserted,
    )
    history = state.history.append(closing, is_open)
    chain_states = update_chain(settings.chain, state.chain_states, history, closing)
    init = settings.ending.init(is_open.shape[0])
    is_over = history.num_generated >= settings.ending.max_new_tokens
    reason = jnp.where(is_open, jnp.where(is_over, LENGTH, RUNNING), state.end.reason)
    changed = {
        "history": history,
        "core_state": _where_rows(is_open, output.state[:, -1:], state.core_state),
        "chain_states": _where_rows(is_open, chain_states, state.chain_states),
        # No text to stop at reaches across a medium.
        "end": EndState(reason, _where_rows(is_open, init.stop_state, state.end.stop_state)),
    }
    replaced: Any = state.replace(  # type: ignore[attr-defined]
        cache=output.cache, **constrain_rows(settings.sharder, changed)
    )
    return cast(DecodeState, replaced)


def _where_rows(is_new: Bool[Array, "B"], new: Any, old: Any) -> Any:
    def choose(new: jax.Array, old: jax.Array) -> jax.Array:
        return jnp.where(is_new.reshape(-1, *(1,) * (new.ndim - 1)), new, old)

    return jax.tree.map(choose, new, old)
