"""Text with images and sound, as it stands on the host before it becomes a row."""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class ImagePart:
    """An image: float32 [height, width, C] in [-1, 1]. A target is one to learn to draw."""

    pixels: np.ndarray
    is_target: bool = False


@dataclasses.dataclass(frozen=True)
class AudioPart:
    """A clip: mono float32 [samples] in [-1, 1]. A target is one to learn to make.

    `mel`, float32 [F, M], is its normalised log-mel spectrogram where that has been made already.
    """

    waveform: np.ndarray
    sample_rate_hz: int
    is_voice: bool = True
    is_target: bool = False
    mel: np.ndarray | None = None


Part = str | ImagePart | AudioPart


@dataclasses.dataclass(frozen=True)
class Sample:
    """Text, images and sound in their order. `name` is for messages."""

    parts: tuple[Part, ...]
    name: str = "sample"
