"""Images or clips of any prepared TFDS data set, by the names of its features."""

import typing

import numpy as np
from PIL import Image

from megatransformer_jax.config.media_data import AudioSourceConfig, ImageSourceConfig
from megatransformer_jax.config.option import ConfigError
from megatransformer_jax.data.media.images import ImageFitter
from megatransformer_jax.data.media.records import AudioRecord, ImageRecord
from megatransformer_jax.data.media.sounds import WaveformFitter
from megatransformer_jax.data.sources.record import BadRecord, decoded
from megatransformer_jax.data.sources.tfds import open_tfds


class TfdsImages:
    """An image feature, and a text feature with one caption or several."""

    def __init__(self, options: ImageSourceConfig, split: str, fitter: ImageFitter):
        self._records, features, self._name = open_tfds(
            options.tfds_name, options.tfds_data_dir, split, "data.media.images.source"
        )
        self._image_field, self._caption_field = options.image_field, options.caption_field
        for option in ("image_field", "caption_field"):
            _check_feature(
                features, getattr(options, option), f"data.media.images.{option}", self._name
            )
        self._fitter = fitter

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> ImageRecord | BadRecord:
        where = f"{self._name}, record {index}"
        record = self._records[index]
        captions = _texts(record, self._caption_field, where)
        if isinstance(captions, BadRecord):
            return captions
        array = np.asarray(_find(record, self._image_field))
        if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] not in (1, 3, 4):
            return BadRecord(
                where,
                f"{self._image_field!r} is {array.dtype} {array.shape}, not an image of 8 bits.",
            )
        image = Image.fromarray(array[..., 0] if array.shape[2] == 1 else array)
        pixels = self._fitter.fit(image, where)
        if isinstance(pixels, BadRecord):
            return pixels
        return ImageRecord(pixels, captions, captions, where)


class TfdsAudio:
    """A feature with samples, and a text feature with what is said.

    Raises:
      ConfigError: if a feature is missing, or nothing says the rate.
    """

    def __init__(
        self, options: AudioSourceConfig, split: str, fitter: WaveformFitter, sample_rate_hz: int
    ):
        self._records, features, self._name = open_tfds(
            options.tfds_name, options.tfds_data_dir, split, "data.media.audio.source"
        )
        self._audio_field, self._text_field = options.audio_field, options.transcript_field
        for option in ("audio_field", "transcript_field"):
            _check_feature(
                features, getattr(options, option), f"data.media.audio.{option}", self._name
            )
        declared = getattr(_find(features, self._audio_field), "_sample_rate", None)
        stored_rate = options.tfds_sample_rate_hz or declared
        if stored_rate is None:
            raise ConfigError(
                "data.media.audio.tfds_sample_rate_hz",
                f"is None, and {self._name} does not say its rate; give it.",
            )
        self._stored_rate = int(stored_rate)
        self._rate = sample_rate_hz
        self._is_voice = options.is_voice
        self._fitter = fitter

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> AudioRecord | BadRecord:
        where = f"{self._name}, record {index}"
        record = self._records[index]
        texts = _texts(record, self._text_field, where)
        if isinstance(texts, BadRecord):
            return texts
        samples = np.asarray(_find(record, self._audio_field))
        if samples.dtype.kind == "i":
            # TFDS stores samples of 16 bits as int64.
            samples = samples.astype(np.float32) / np.float32(32768)
        waveform = self._fitter.fit(samples, self._stored_rate, where)
        if isinstance(waveform, BadRecord):
            return waveform
        return AudioRecord(waveform, self._rate, texts[0], self._is_voice, where)


def _find(record: typing.Any, path: str) -> typing.Any:
    """What is at 'a/b' in a record of dictionaries.

    In a sequence of dictionaries TFDS may store each feature as a sequence, or the dictionaries.
    """
    for name in path.split("/"):
        if isinstance(record, (list, tuple)):
            record = [item[name] for item in record]
        else:
            record = record[name]
    return record


def _texts(record: typing.Any, field: str, where: str) -> tuple[str, ...] | BadRecord:
    """Texts of a feature that holds one or several; those that are empty are left out."""
    value = _find(record, field)
    items = [value] if isinstance(value, (str, bytes)) else list(np.asarray(value).reshape(-1))
    texts = []
    for item in items:
        text = decoded(item, where) if isinstance(item, bytes) else str(item)
        if isinstance(text, BadRecord):
            return text
        if text.strip():
            texts.append(text)
    return tuple(texts) or BadRecord(where, f"has no text in {field!r}. Leave it out.")


def _check_feature(features: typing.Any, path: str, option: str, name: str) -> None:
    try:
        _find(features, path)
    except (KeyError, TypeError) as error:
        raise ConfigError(
            option,
            f"{path!r} is not a feature of {name}; its features: {', '.join(map(repr, features))}. "
            "Name one; a/b is the feature b in a.",
        ) from error
