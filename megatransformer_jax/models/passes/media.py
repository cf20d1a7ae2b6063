"""Text with media as passes with a cache take it, and the conditions of media to be made."""

from typing import Any, cast

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, Key

from megatransformer_jax.models.media.decoder import Condition
from megatransformer_jax.models.megatransformer import MegaTransformer
from megatransformer_jax.models.passes.cached import Inserted, NewTokens, token_states
from megatransformer_jax.ops.interleave import interleave, place_media, take_places
from megatransformer_jax.types import MediaBatch


def media_sequence(
    model: MegaTransformer,
    params: Any,
    tokens: Int[Array, "B T"],
    lengths: Int[Array, "B"],
    media: MediaBatch,
    num_columns: int,
) -> NewTokens:
    """Encodes media and puts them between the tokens.

    Args:
      model: with parts for media.
      params: its parameters.
      tokens: left-aligned.
      lengths: tokens of each row.
      media: of the rows; `follows` beyond `lengths` is not read.
      num_columns: S, at least as long as the longest row with its media.

    Returns:
      Rows with their last place in the last column; ids are 0 at places of media and of padding.
    """
    segment_ids = _segments(tokens, lengths)

    def enter(module: Any) -> Any:
        layout = module.media.layout(media, segment_ids)
        return layout, module.media.encode(media, True)

    layout, (images, clips) = cast(Any, model.apply({"params": params}, method=enter))
    values = place_media(layout, images, clips)
    used = jnp.sum(layout.segment_ids > 0, axis=1)
    places = used[:, None] - num_columns + jnp.arange(num_columns)
    is_token = places >= 0
    is_medium = take_places(layout.is_medium, places)
    ids = take_places(interleave(layout, tokens), places)
    return NewTokens(ids, is_token, Inserted(take_places(values, places), is_medium))


def opened_medium(
    model: MegaTransformer,
    params: Any,
    opening: Int[Array, "B"],
    is_open: Bool[Array, "B"],
    media: MediaBatch,
) -> NewTokens:
    """An opening token and the one medium behind it in the last columns; other rows are padding.

    Args:
      model: with parts for media.
      params: its parameters.
      opening: ids.
      is_open: rows that have it.
      media: with one token, the opening one, and one slot per row.
    """
    kinds = ((model.config.image, media.images), (model.config.audio, media.mels))
    room = 1 + max(config.num_tokens for config, slots in kinds if slots is not None)
    lengths = is_open.astype(jnp.int32)
    return media_sequence(model, params, opening[:, None], lengths, media, room)


def media_conditions(
    model: MegaTransformer,
    params: Any,
    tokens: Int[Array, "B T"],
    lengths: Int[Array, "B"],
    media: MediaBatch,
    num_steps: Int[Array, ""],
    state_keys: Key[Array, "B"],
) -> dict[str, Condition]:
    """Conditions of all slots, 'image' of [B * I] and 'audio' of [B * A], as in training.

    A whole pass without a cache. The slot of a medium that is still to be made is unused; its
    `follows` says where it opens.

    Args:
      model: with parts for media.
      params: its parameters.
      tokens: left-aligned.
      lengths: tokens of each row.
      media: of the rows.
      num_steps: iterations of the core.
      state_keys: of each row, for first states that are drawn; those of `NewTokens`.
    """
    config = model.config
    segment_ids, state = _segments(tokens, lengths), None
    if config.is_recurrent and config.recurrence.state_init not in ("zero", "none"):

        def lay_out(module: Any) -> Any:
            return module.media.layout(media, segment_ids).positions

        positions: Any = model.apply({"params": params}, method=lay_out)
        shape = (*positions.shape, config.core_width)
        # Drawn states depend on the shape and type of what is injected only.
        injected = jnp.zeros(shape, model.policy.compute)
        state = token_states(config, state_keys, positions, injected)
    output: Any = model.apply(
        {"params": params},
        tokens,
        segment_ids=segment_ids,
        num_steps=num_steps,
        state=state,
        media=media,
    )
    conditions: dict[str, Condition] = output.conditions
    return conditions


def medium_of_slot(condition: Condition, slots: Int[Array, "B"]) -> Condition:
    """Of the slots of each row the named one: conditions of B media from those of B * slots."""

    def take(array: jax.Array) -> jax.Array:
        by_row = array.reshape(slots.shape[0], -1, *array.shape[1:])
        index = slots.reshape(-1, *(1,) * (by_row.ndim - 1))
        return jnp.take_along_axis(by_row, index, axis=1)[:, 0]

    return Condition(take(condition.context), take(condition.is_context))


def _segments(tokens: jax.Array, lengths: jax.Array) -> jax.Array:
    return (jnp.arange(tokens.shape[1]) < lengths[:, None]).astype(jnp.int32)
