"""Images and sound on the host: records of sources, samples, and the formats that a model reads."""

import dataclasses
import typing

import numpy as np

from megatransformer_jax.config.audio import AudioConfig
from megatransformer_jax.config.image import ImageConfig
from megatransformer_jax.config.model import ModelConfig
from megatransformer_jax.data.sources.record import BadRecord, Records


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


# ------------------------------------------------------------------------------
# Text with images and sound, as it stands on the host before it becomes a row.


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


@dataclasses.dataclass(frozen=True)
class Given:
    """Text that is read and not learned, such as a question: no loss is computed on it."""

    text: str


Part = str | ImagePart | AudioPart


@dataclasses.dataclass(frozen=True)
class Sample:
    """Text, images and sound in their order. `name` is for messages."""

    parts: tuple[Part | Given, ...]
    name: str = "sample"


# ------------------------------------------------------------------------------
# The formats of images and sound that a model reads.


@dataclasses.dataclass(frozen=True)
class MediaFormats:
    """What media must look like. A medium whose section is not enabled has no slots in batches."""

    image: ImageConfig = dataclasses.field(default_factory=ImageConfig)
    audio: AudioConfig = dataclasses.field(default_factory=AudioConfig)

    @classmethod
    def of_model(cls, config: ModelConfig) -> typing.Self:
        """Those of a model."""
        return cls(config.image, config.audio)
