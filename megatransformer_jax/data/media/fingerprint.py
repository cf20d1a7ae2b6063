"""Tells cheaply whether the media of an earlier run are still the same."""

import hashlib
import typing

import sklearn

from megatransformer_jax.config.data import DataConfig
from megatransformer_jax.config.media_data import AudioDataConfig, ImageDataConfig
from megatransformer_jax.data.media import espeak
from megatransformer_jax.data.media.build import audio_source_name
from megatransformer_jax.data.media.folders import AUDIO_FOLDER, IMAGE_FOLDER, folder_files
from megatransformer_jax.data.sources.tfds import open_tfds


def media_fingerprint(
    config: DataConfig, fingerprint_files: typing.Callable[[list[str]], str]
) -> str:
    """What decides the media beside the configuration, in words for a message.

    Args:
      config: with source='media'.
      fingerprint_files: of the content of files.

    Raises:
      UserError: if the data cannot be read.
    """
    parts = []
    media = config.media
    if media.has_images:
        parts.append(f"images: {_of_images(media.images, fingerprint_files)}")
    if media.has_audio:
        name = audio_source_name(config)
        parts.append(f"audio: {_of_audio(name, media.audio, fingerprint_files)}")
    return "; ".join(parts) or "embedded text"


def _of_images(
    options: ImageDataConfig, fingerprint_files: typing.Callable[[list[str]], str]
) -> str:
    if options.source == "tfds":
        return _of_tfds(options, "data.media.images.source")
    if options.source == "image_folder":
        assert options.folder is not None  # A rule of the configuration.
        return fingerprint_files(folder_files(options.folder, IMAGE_FOLDER))
    return f"{options.source} of scikit-learn {sklearn.__version__.split('.', maxsplit=1)[0]}"


def _of_audio(
    name: str, options: AudioDataConfig, fingerprint_files: typing.Callable[[list[str]], str]
) -> str:
    if name == "tfds":
        return _of_tfds(options, "data.media.audio.source")
    if name == "audio_folder":
        assert options.folder is not None  # A rule of the configuration.
        return fingerprint_files(folder_files(options.folder, AUDIO_FOLDER))
    return name if name == "tones" else f"{name} by {espeak.version()}"


def _of_tfds(options: ImageDataConfig | AudioDataConfig, option: str) -> str:
    """Number of records of each split, and names and types of features."""
    words = []
    for split in (options.tfds_split, options.tfds_validation_split):
        if split is not None:
            records, features, name = open_tfds(
                options.tfds_name, options.tfds_data_dir, split, option
            )
            digest = hashlib.sha256(repr(features).encode()).hexdigest()[:16]
            words.append(f"{name} has {len(records)} records, features {digest}")
    return ", ".join(words)
