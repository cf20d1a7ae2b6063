"""Makes the media that rows of a generation wait for: the compiled steps, and who needs them."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from megatransformer_jax import streams
from megatransformer_jax.config.generation import GenerationConfig
from megatransformer_jax.config.model import ModelConfig
from megatransformer_jax.config.option import ConfigError
from megatransformer_jax.data.media_tokenizer import MediaTokenizer
from megatransformer_jax.generation.decode_loop import DecodeSettings, DecodeState
from megatransformer_jax.generation.endings import LENGTH, RUNNING, EndState
from megatransformer_jax.generation.history import History
from megatransformer_jax.generation.media_prompt import MediaRow, follows_of, media_batch
from megatransformer_jax.generation.placement import (
    constrain_rows,
    fetch,
    put_rows,
    replicate,
)
from megatransformer_jax.generation.prefill import Prefilled
from megatransformer_jax.generation.processors.processor import init_chain, update_chain
from megatransformer_jax.models.media.decoder import Condition
from megatransformer_jax.models.megatransformer import MegaTransformer
from megatransformer_jax.models.passes.cached import NewTokens, cached_forward
from megatransformer_jax.models.passes.media import (
    media_conditions,
    media_sequence,
    medium_of_slot,
    opened_medium,
)
from megatransformer_jax.types import AUDIO, IMAGE, MediaBatch

# ------------------------------------------------------------------------------
# Who waits for which medium.


class MediaMaker:
    """Runs the decoders.

    Args:
      model: with parts for media.
      params: its parameters.
      tokenizer: of the model.
      config: of the generation; its depth is a number, unless there is no core.

    Raises:
      ConfigError: if there are more steps than a decoder's diffusion has times.
    """

    def __init__(
        self,
        model: MegaTransformer,
        params: Any,
        tokenizer: MediaTokenizer,
        config: GenerationConfig,
    ):
        self._params = params
        self._tokenizer = tokenizer
        self._num_steps = replicate(model.sharder, jnp.int32(config.depth.depth or 1))
        self._settings = sampler_settings(model.config, config)

    def make(
        self,
        model: MegaTransformer,
        tokens: np.ndarray,
        lengths: np.ndarray,
        rows: Sequence[MediaRow],
        opened: np.ndarray,
        num_slots: tuple[int, int],
        keys: jax.Array,
    ) -> dict[int, np.ndarray]:
        """An image, or a clip's mel spectrogram, for each row that waits, by its number.

        Args:
          model: as it passes that many rows.
          tokens: int32 [B, T], left-aligned.
          lengths: int32 [B]; the last token of a row that waits opens its medium.
          rows: media so far.
          opened: int32 [B], kind of the medium that a row waits for, 0 for none.
          num_slots: images and clips that rows have room for, one more than they have now.
          keys: of each row.
        """
        images = [row.images for row in rows]
        mels = [row.mels for row in rows]
        media = media_batch(
            model.config, follows_of(tokens, lengths, self._tokenizer), images, mels, num_slots
        )
        slots = {"image": _counts(images, num_slots[0]), "audio": _counts(mels, num_slots[1])}
        arrays = (tokens.astype(np.int32), lengths.astype(np.int32), media, slots)
        conditions = conditions_of_openings(
            model, self._params, *put_rows(model.sharder, arrays), self._num_steps, keys
        )
        made: dict[int, np.ndarray] = {}
        for name, kind in (("image", IMAGE), ("audio", AUDIO)):
            waiting = np.flatnonzero(opened == kind).tolist()
            if waiting:
                numbers = [rows[row].num_made for row in waiting]
                own = self._run(model, name, conditions[name], waiting, numbers, keys)
                made |= dict(zip(waiting, own, strict=True))
        return made

    def _run(
        self,
        model: MegaTransformer,
        name: str,
        condition: Any,
        waiting: Sequence[int],
        numbers: Sequence[int],
        keys: jax.Array,
    ) -> list[np.ndarray]:
        """Media of one kind; `numbers` tells how many each row has made before."""
        chosen = _rounded_up(waiting, len(keys), model.sharder.ways("batch"))
        before = np.zeros(len(keys), np.int32)
        before[waiting] = numbers
        rows, counts = put_rows(model.sharder, (chosen, before[chosen]))
        own_keys = _media_keys(keys, rows, counts)
        settings = self._settings[name]
        arguments = (model, self._params, condition, rows, own_keys)
        place = {int(row): at for at, row in reversed(list(enumerate(chosen)))}
        if name == "image":
            pixels = fetch(model.sharder, draw_images(*arguments, settings=settings))
            return [pixels[place[row]] for row in waiting]
        mels, frames = fetch(model.sharder, make_clips(*arguments, settings=settings))
        return [mels[place[row]][: frames[place[row]]] for row in waiting]


def sampler_settings(model: ModelConfig, config: GenerationConfig) -> dict[str, Any]:
    """Settings of the samplers of 'image' and 'audio': the model's, changed by the generation's.

    Raises:
      ConfigError: if there are more steps than a decoder's diffusion has times.
    """
    changes: dict[str, Any] = {}
    if config.media.guidance_scale is not None:
        changes["guidance_scale"] = config.media.guidance_scale
    if config.media.sampler_steps is not None:
        changes["num_steps"] = config.media.sampler_steps
    settings = {}
    if model.image.enabled:
        decoder = model.image.decoder
        settings["image"] = dataclasses.replace(decoder.settings, **changes)
        if decoder.kind == "unet":
            _check_steps(settings["image"].num_steps, decoder.diffusion.num_times)
    if model.audio.enabled:
        settings["audio"] = dataclasses.replace(model.audio.decoder.sampler, **changes)
        _check_steps(settings["audio"].num_steps, model.audio.decoder.diffusion.num_times)
    return settings


def _check_steps(num_steps: int, num_times: int | None) -> None:
    if num_times is not None and num_steps > num_times:
        raise ConfigError(
            "media.sampler_steps",
            f"{num_steps} is more than the {num_times} times of the model's diffusion "
            "(diffusion.num_times); lower it.",
        )


def _counts(media: Sequence[Sequence[np.ndarray]], num_slots: int) -> np.ndarray:
    """The first free slot of each row; of a full row, which waits for nothing, its last."""
    counts = np.asarray([len(own) for own in media], np.int32)
    return np.minimum(counts, num_slots - 1)


def _rounded_up(waiting: Sequence[int], num_rows: int, ways: int) -> np.ndarray:
    """The rows that wait, filled up to a power of two so that most numbers compile nothing; on a
    mesh all rows, which are cut as they are."""
    if ways > 1:
        return np.arange(num_rows, dtype=np.int32)
    size = min(num_rows, 1 << (len(waiting) - 1).bit_length())
    return np.asarray([*waiting, *[waiting[0]] * (size - len(waiting))], np.int32)


@jax.jit
def _media_keys(keys: jax.Array, rows: jax.Array, counts: jax.Array) -> jax.Array:
    """A key per medium: of its row, and of how many media the row has made before."""

    def fold(key: jax.Array, count: jax.Array) -> jax.Array:
        return jax.random.fold_in(jax.random.fold_in(key, streams.GENERATED_MEDIA), count)

    return jax.vmap(fold)(keys[rows], counts)


# ------------------------------------------------------------------------------
# The compiled steps of generation with media: read prompts, make media, read them back.


@functools.partial(jax.jit, static_argnums=0, static_argnames="num_columns")
def enter_prompts(
    model: MegaTransformer,
    params: Any,
    tokens: Int[Array, "B T"],
    lengths: Int[Array, "B"],
    media: MediaBatch,
    *,
    num_columns: int,
) -> NewTokens:
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
    new: Any = opened_medium(model, params, opening, is_open, media)
    new = new.replace(state_keys=settings.row_keys)
    output = cached_forward(model, params, new, state.cache, settings.rule, last_logits_only=True)
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
