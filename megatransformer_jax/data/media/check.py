"""Checks that media and their places in the text belong together."""

from collections.abc import Sequence

import numpy as np

from megatransformer_jax.config.option import UserError
from megatransformer_jax.data.media_tokenizer import MediaTokenizer
from megatransformer_jax.types import AUDIO, IMAGE, Batch

_WORDS = {
    IMAGE: ("images", "<|IMAGE|><|/IMAGE|>"),
    AUDIO: ("clips", "<|AUDIO|><|/AUDIO|> or <|VOICE|><|/VOICE|>"),
}


class MediaCountError(UserError):
    """Media and placeholders are not the same in number."""


def check_prompt(
    ids: Sequence[int], num_images: int, num_clips: int, tokenizer: MediaTokenizer, name: str
) -> None:
    """Checks that a prompt has one placeholder for each medium that is given with it.

    A placeholder is an opening token with its closing one. An opening token at the end asks for a
    medium to be made, and has none.

    Args:
      ids: of the prompt, see `MediaTokenizer.encode_with_media`.
      num_images: images that are given.
      num_clips: clips that are given.
      tokenizer: of the ids.
      name: of the prompt, for the message.

    Raises:
      MediaCountError: otherwise, with both numbers.
    """
    placed = [tokenizer.medium_after(token) for token in ids[:-1]]
    for medium, given in ((IMAGE, num_images), (AUDIO, num_clips)):
        _compare(name, medium, placed.count(medium), given)


def check_media(batch: Batch, tokenizer: MediaTokenizer) -> None:
    """Checks a batch on the host: opening tokens, `follows` and used slots agree in every row.

    Raises:
      MediaCountError: otherwise, naming the row.
      ValueError: if the batch has no media.
    """
    media = batch.media
    if media is None:
        raise ValueError("the batch has no media; give one with a MediaBatch.")
    lookup = np.array([tokenizer.medium_after(token) for token in range(tokenizer.vocab_size)])
    expected = np.where(np.asarray(batch.segment_ids) > 0, lookup[np.asarray(batch.tokens)], 0)
    for row, place in np.argwhere(expected != np.asarray(media.follows)).tolist():
        raise MediaCountError(
            f"row {row}: `follows` is {media.follows[row][place]} at position {place}, whose token "
            f"{batch.tokens[row][place]} asks for {expected[row][place]} (0 none, {IMAGE} image, "
            f"{AUDIO} sound). Make both from the same text."
        )
    for medium, used in (
        (IMAGE, media.is_image),
        (AUDIO, None if media.mel_lengths is None else np.asarray(media.mel_lengths) > 0),
    ):
        for row, placed in enumerate((expected == medium).sum(axis=1)):
            slots = np.zeros(0, bool) if used is None else np.asarray(used)[row]
            _compare(f"row {row}", medium, int(placed), int(slots.sum()))
            if not slots[: int(placed)].all():
                raise MediaCountError(
                    f"row {row}: its {_WORDS[medium][0]} are in slots {np.flatnonzero(slots)}; "
                    "they must be in the first ones, in the order of the text."
                )


def _compare(name: str, medium: int, placed: int, given: int) -> None:
    what, placeholder = _WORDS[medium]
    if placed != given:
        raise MediaCountError(
            f"{name}: has places for {placed} {what}, but {given} {what} are given. Write "
            f"{placeholder} once for each, and give as many."
        )
