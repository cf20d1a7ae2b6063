"""What sources of images and sound yield."""

import dataclasses
import typing

import numpy as np

from megatransformer_jax.data.sources.combine import Records
from megatransformer_jax.data.sources.record import BadRecord


@dataclasses.dataclass(frozen=True)
class ImageRecord:
    """An image and what is said of it.

    Attributes:
      pixels: float32 [height, width, C] in [-1, 1], of the model's size.
      prompts: texts that ask for this image; training draws one of them.
      captions: texts that describe it; training draws one of them.
      where: for messages.
    """

    pixels: np.ndarray
    prompts: tuple[str, ...]
    captions: tuple[str, ...]
    where: str


@dataclasses.dataclass(frozen=True)
class AudioRecord:
    """A clip and what is said in it, or what it is.

    Attributes:
      waveform: mono float32 [samples] in [-1, 1].
      sample_rate_hz: samples per second; the model's.
      transcript: words that are spoken, or a caption.
      is_voice: whether it is speech.
      where: for messages.
    """

    waveform: np.ndarray
    sample_rate_hz: int
    transcript: str
    is_voice: bool
    where: str


class ImageSource(Records[ImageRecord | BadRecord], typing.Protocol):
    """Images by number. Sources pickle, so that worker processes can have one each."""


class AudioSource(Records[AudioRecord | BadRecord], typing.Protocol):
    """Clips by number. Sources pickle, so that worker processes can have one each."""
