"""Makes the media that rows of a generation wait for."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from megatransformer_jax.config.generation import GenerationConfig
from megatransformer_jax.config.model import ModelConfig
from megatransformer_jax.config.option import ConfigError
from megatransformer_jax.data.media_tokenizer import MediaTokenizer
from megatransformer_jax.generation.media_slots import MediaRow, follows_of, media_batch
from megatransformer_jax.generation.media_steps import (
    conditions_of_openings,
    draw_images,
    make_clips,
)
from megatransformer_jax.generation.placement import fetch, put_rows, replicate, row_ways
from megatransformer_jax.models.megatransformer import MegaTransformer
from megatransformer_jax.types import AUDIO, IMAGE

# Keeps these draws apart from those of tokens and first states from the same key.
_MEDIA_STREAM = 0x3ED1A


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
        chosen = _rounded_up(waiting, len(keys), row_ways(model.sharder))
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
        return jax.random.fold_in(jax.random.fold_in(key, _MEDIA_STREAM), count)

    return jax.vmap(fold)(keys[rows], counts)
