"""Rows of text and media on the host, and the arrays that the model takes of them."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from megatransformer_jax.config.model import ModelConfig
from megatransformer_jax.data.media_tokenizer import MediaTokenizer
from megatransformer_jax.types import MediaBatch


@dataclasses.dataclass
class MediaRow:
    """One text while it is generated.

    Attributes:
      images: those of the prompt, then those that were made.
      mels: the same.
      num_given: images and clips of the prompt.
    """

    images: list[np.ndarray]
    mels: list[np.ndarray]
    num_given: tuple[int, int]

    @property
    def num_made(self) -> int:
        """Media that were made."""
        return len(self.images) + len(self.mels) - sum(self.num_given)


def media_batch(
    config: ModelConfig,
    follows: np.ndarray,
    images: Sequence[Sequence[np.ndarray]],
    mels: Sequence[Sequence[np.ndarray]],
    num_slots: tuple[int, int],
) -> MediaBatch:
    """Media of rows in slots, as NumPy arrays.

    Args:
      config: of the model.
      follows: int32 [B, T].
      images: of each row; not read if the model takes none.
      mels: the same.
      num_slots: of images and of clips, per row.
    """
    arrays: dict[str, np.ndarray] = {}
    if config.image.enabled:
        shape = (len(follows), num_slots[0])
        pixels = np.zeros((*shape, *config.image.shape), np.float32)
        is_image = np.zeros(shape, bool)
        for row, own in enumerate(images):
            is_image[row, : len(own)] = True
            for slot, image in enumerate(own):
                pixels[row, slot] = image
        arrays |= {"images": pixels, "is_image": is_image}
    if config.audio.enabled:
        shape = (len(follows), num_slots[1])
        frames = (config.audio.max_frames, config.audio.mel.num_mels)
        spectrograms = np.zeros((*shape, *frames), np.float32)
        lengths = np.zeros(shape, np.int32)
        for row, own in enumerate(mels):
            for slot, mel in enumerate(own):
                spectrograms[row, slot, : len(mel)] = mel
                lengths[row, slot] = len(mel)
        arrays |= {"mels": spectrograms, "mel_lengths": lengths}
    return MediaBatch(follows.astype(np.int32), **arrays)


def follows_of(tokens: np.ndarray, lengths: np.ndarray, tokenizer: MediaTokenizer) -> np.ndarray:
    """`MediaBatch.follows` of left-aligned ids, int32 [B, T]."""
    kinds = np.zeros(tokens.shape, np.int32)
    for opening in tokenizer.opening_ids:
        kinds[tokens == opening] = tokenizer.medium_after(opening)
    kinds[np.arange(tokens.shape[1]) >= lengths[:, None]] = 0
    return kinds


def places_of(config: ModelConfig, num_images: int, mels: Sequence[np.ndarray]) -> int:
    """Places that media take in a sequence."""
    places = num_images * config.image.num_tokens if num_images else 0
    return places + sum(-(-len(mel) // config.audio.downsampling) for mel in mels)


def most_places(config: ModelConfig) -> int:
    """Places of the longest medium that the model makes."""
    return max(kind.num_tokens for kind in (config.image, config.audio) if kind.enabled)
