"""Reads and makes the media of a generation: which rows wait for one, and the compiled steps.

Rows are decoded until each has ended or has chosen an opening token. Rows that did wait until none
writes text any more; then all get their media at once, which are read back into the cache with
their closing tokens, and the rows go on.

What a medium is made from (its condition) comes from a pass over the whole row without a cache: it
is what training computed, at the fixed depth of the request even if tokens of text exit early. That
costs as much as reading the row again, once per medium, which is cheap compared with a sampler's
steps.
"""

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
from megatransformer_jax.config.option import ConfigError, UserError
from megatransformer_jax.data.media.encoding import check_prompt
from megatransformer_jax.data.media_tokenizer import MEDIUM_AFTER, MediaTokenizer
from megatransformer_jax.generation.decode_loop import DecodeSettings, DecodeState
from megatransformer_jax.generation.endings import END_OF_TEXT, LENGTH, RUNNING, EndState
from megatransformer_jax.generation.media_prompt import (
    EncodedPrompt,
    MediaPlan,
    MediaRow,
    follows_of,
    media_batch,
)
from megatransformer_jax.generation.placement import (
    constrain_rows,
    fetch,
    put_rows,
    replicate,
)
from megatransformer_jax.generation.processors.processor import AllowedTokens, init_chain
from megatransformer_jax.generation.request import GeneratedClip, GeneratedImage, GeneratedMedium
from megatransformer_jax.generation.strategies import Decoded
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
    """The media of a generation: reads those of prompts, and makes those that rows wait for.

    Attributes:
      tokenizer: of the model.
      openings: ids after which the model makes a medium.

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
        self.tokenizer = tokenizer
        makes = {IMAGE: model.config.image.enabled, AUDIO: model.config.audio.enabled}
        self.openings = [
            token for token in tokenizer.opening_ids if makes[tokenizer.medium_after(token)]
        ]
        self._config = config
        self._num_steps = replicate(model.sharder, jnp.int32(config.depth.depth or 1))
        self._settings = sampler_settings(model.config, config)

    def check(self, prompt: EncodedPrompt, name: str) -> None:
        """Raises:
        UserError: if a prompt has other media than its markers say, or one at its end asks for a
          medium and none may be made.
        """
        name = prompt.name or name
        counts = (len(prompt.images), len(prompt.mels))
        check_prompt(prompt.ids, *counts, self.tokenizer, name)
        marker, config = self.tokenizer.marker_of(prompt.ids[-1]), self._config
        if marker in MEDIUM_AFTER and not config.most_media:
            fix = "choose another strategy" if config.strategy == "beam" else "raise it"
            raise UserError(
                f"{name}: ends with {marker}, which asks for a medium, but with max_media=0 and "
                f"strategy={config.strategy!r} none are made; leave the marker out, or {fix}."
            )

    def enter(
        self,
        model: MegaTransformer,
        prompts: Sequence[EncodedPrompt],
        plan: MediaPlan,
        row_keys: jax.Array,
    ) -> NewTokens:
        """Prompts with their media, without an opening token at the end, which enters the cache
        with its medium."""
        tokens, lengths = _rows_of_ids(prompts, plan.num_prompt_tokens)
        lengths -= self._opened(prompts) > 0
        follows = follows_of(tokens, lengths, self.tokenizer)
        images, mels = [one.images for one in prompts], [one.mels for one in prompts]
        media = media_batch(model.config, follows, images, mels, plan.prompt_slots)
        arrays = put_rows(model.sharder, (tokens, lengths, media))
        columns = plan.cache.num_columns
        new: Any = enter_prompts(model, self._params, *arrays, num_columns=columns)
        return cast(NewTokens, new.replace(state_keys=row_keys))

    def with_openings(self, settings: DecodeSettings, rows: Sequence[MediaRow]) -> DecodeSettings:
        """Allows opening tokens to the rows that may have more media.

        Closing tokens are never chosen: they follow media by themselves.
        """
        own = next(one for one in settings.chain if isinstance(one, AllowedTokens))
        allowed = np.asarray(fetch(settings.sharder, own.is_allowed))
        # Of rows that had their openings before, all are alike but for these.
        allowed = np.tile(allowed.reshape(-1, allowed.shape[-1])[:1], (len(rows), 1))
        for row, media in enumerate(rows):
            allowed[row, self.openings] = len(media.made) < self._config.most_media
        placed = AllowedTokens(put_rows(settings.sharder, allowed))
        chain = tuple(placed if one is own else one for one in settings.chain)
        return dataclasses.replace(settings, chain=chain)

    def _opened(self, prompts: Sequence[EncodedPrompt]) -> np.ndarray:
        """Kind of the medium that each prompt opens at its end, int32 [B]; 0 for none."""
        kinds = [self.tokenizer.medium_after(prompt.ids[-1]) for prompt in prompts]
        return np.asarray(kinds, np.int32)

    def waiting(self, decoded: Decoded) -> np.ndarray:
        """Kind of the medium that each row waits for, int32 [B]; 0 for none."""
        last = decoded.tokens[np.arange(len(decoded.lengths)), decoded.lengths - 1]
        kinds = np.asarray([self.tokenizer.medium_after(token) for token in last], np.int32)
        return np.where(decoded.reasons == END_OF_TEXT, kinds, 0)

    def give(
        self,
        model: MegaTransformer,
        settings: DecodeSettings,
        state: DecodeState,
        decoded: Decoded,
        rows: Sequence[MediaRow],
        num_slots: tuple[int, int],
    ) -> tuple[DecodeSettings, DecodeState]:
        """Makes what rows wait for, closes it and lets them go on.

        Args:
          model: as it passes that many rows.
          settings: of all of them.
          state: of them; donated.
          decoded: the same on the host.
          rows: media so far; gets what is made.
          num_slots: see `make`.
        """
        opened = self.waiting(decoded)
        tokens, lengths, keys = decoded.tokens, decoded.lengths, settings.row_keys
        made = self.make(model, tokens, lengths, rows, num_slots, keys, opened)
        new = [MediaRow([], []) for _ in rows]
        for row, medium in made.items():
            new[row].add(medium)
            rows[row].add(medium)
        images, mels = [row.images for row in new], [row.mels for row in new]
        media = media_batch(model.config, opened[:, None], images, mels, (1, 1))
        last = tokens[np.arange(len(lengths)), lengths - 1]
        closing = np.where(opened > 0, last + 1, 0).astype(np.int32)
        media, closing = put_rows(model.sharder, (media, closing))
        settings = self.with_openings(settings, rows)
        return settings, read_media(model, self._params, settings, state, media, closing)

    def make_for(
        self,
        model: MegaTransformer,
        prompts: Sequence[EncodedPrompt],
        num_tokens: int,
        num_slots: tuple[int, int],
        keys: jax.Array,
    ) -> list[GeneratedMedium]:
        """The media that prompts open at their end, without a cache.

        Args:
          model: as it passes that many rows.
          prompts: of each row.
          num_tokens: text of a row is padded to it.
          num_slots: see `make`.
          keys: of each row.
        """
        tokens, lengths = _rows_of_ids(prompts, num_tokens)
        rows = [MediaRow.of_prompt(prompt) for prompt in prompts]
        made = self.make(model, tokens, lengths, rows, num_slots, keys, self._opened(prompts))
        return [made[row] for row in range(len(prompts))]

    def make(
        self,
        model: MegaTransformer,
        tokens: np.ndarray,
        lengths: np.ndarray,
        rows: Sequence[MediaRow],
        num_slots: tuple[int, int],
        keys: jax.Array,
        opened: np.ndarray,
    ) -> dict[int, GeneratedMedium]:
        """The medium of each row that waits, by its number.

        Args:
          model: as it passes that many rows.
          tokens: int32 [B, T], left-aligned.
          lengths: int32 [B]; the last token of a row that waits opens its medium.
          rows: media so far.
          num_slots: images and clips that rows have room for, one more than they have now.
          keys: of each row.
          opened: int32 [B], kind of the medium that a row waits for, 0 for none.
        """
        images = [row.images for row in rows]
        mels = [row.mels for row in rows]
        media = media_batch(
            model.config, follows_of(tokens, lengths, self.tokenizer), images, mels, num_slots
        )
        slots = {"image": _counts(images, num_slots[0]), "audio": _counts(mels, num_slots[1])}
        arrays = (tokens.astype(np.int32), lengths.astype(np.int32), media, slots)
        conditions = conditions_of_openings(
            model, self._params, *put_rows(model.sharder, arrays), self._num_steps, keys
        )
        made: dict[int, GeneratedMedium] = {}
        for name, kind in (("image", IMAGE), ("audio", AUDIO)):
            waiting = np.flatnonzero(opened == kind).tolist()
            if waiting:
                numbers = [len(rows[row].made) for row in waiting]
                own = self._run(model, name, conditions[name], waiting, numbers, keys)
                for row, medium in zip(waiting, own, strict=True):
                    marker = self.tokenizer.marker_of(tokens[row, lengths[row] - 1])
                    made[row] = (
                        GeneratedImage(medium)
                        if kind == IMAGE
                        else GeneratedClip(medium, is_voice=marker == "<|VOICE|>")
                    )
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


def _rows_of_ids(
    prompts: Sequence[EncodedPrompt], num_tokens: int
) -> tuple[np.ndarray, np.ndarray]:
    """Ids of prompts, int32 [B, T], left-aligned, and how many there are, int32 [B]."""
    tokens = np.zeros((len(prompts), num_tokens), np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt.ids)] = prompt.ids
    return tokens, np.asarray([len(prompt.ids) for prompt in prompts], np.int32)


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
# The compiled steps: read prompts, make media, read them back.


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
    # Those of a row that waited while others went on mean nothing, see `update_chain`.
    chain_states = init_chain(settings.chain, history)
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
