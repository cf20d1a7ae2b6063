"""Real digits with their labels, written and spoken, of the splits that a run was trained on."""

from typing import NamedTuple

import numpy as np

from megatransformer_jax.config.audio import MelConfig
from megatransformer_jax.config.data import DataConfig
from megatransformer_jax.config.image import ImageConfig
from megatransformer_jax.data.media.build import build_audio_source, build_image_source
from megatransformer_jax.data.media.images import WORDS
from megatransformer_jax.data.mel import normalized_mel
from megatransformer_jax.data.sources.record import BadRecord


class LabelledImages(NamedTuple):
    """Images [N, height, width, C] in [-1, 1], the digit in each, and prompts by digit."""

    images: np.ndarray
    labels: np.ndarray
    prompts: dict[int, tuple[str, ...]]


class LabelledClips(NamedTuple):
    """Normalised log-mel spectrograms [N, F, M], their frames, and the digit in each."""

    mels: np.ndarray
    lengths: np.ndarray
    labels: np.ndarray


def labelled_images(config: DataConfig, image: ImageConfig, split: str) -> LabelledImages:
    """All images of a split, 'train' or 'validation', of source 'digits'."""
    source = build_image_source(config, image, split)
    records = [source[number] for number in range(len(source))]
    good = [record for record in records if not isinstance(record, BadRecord)]
    labels = np.array([WORDS.index(record.captions[0]) for record in good])
    prompts = {
        int(label): good[int(np.argmax(labels == label))].prompts for label in np.unique(labels)
    }
    return LabelledImages(np.stack([record.pixels for record in good]), labels, prompts)


def labelled_clips(config: DataConfig, mel: MelConfig, split: str, every: int = 1) -> LabelledClips:
    """Every n-th clip of a split, 'train' or 'validation', of source 'spoken_digits'."""
    source = build_audio_source(config, mel, split)
    records = [source[number] for number in range(0, len(source), every)]
    good = [record for record in records if not isinstance(record, BadRecord)]
    made = [normalized_mel(record.waveform, mel) for record in good]
    lengths = np.array([len(one) for one in made])
    mels = np.zeros((len(made), lengths.max(), mel.num_mels), np.float32)
    for row, one in zip(mels, made, strict=True):
        row[: len(one)] = one
    return LabelledClips(
        mels, lengths, np.array([WORDS.index(record.transcript) for record in good])
    )
