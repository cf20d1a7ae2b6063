"""From the configuration to sources of images, sound and text, each with its held-out part."""

import typing

from absl import logging

from megatransformer_jax.config.audio import MelConfig
from megatransformer_jax.config.data import (
    ClipDataConfig,
    DataConfig,
    LoaderConfig,
    PictureDataConfig,
)
from megatransformer_jax.config.image import ImageConfig
from megatransformer_jax.config.media_data import AudioSourceConfig, ImageSourceConfig
from megatransformer_jax.config.option import ConfigError
from megatransformer_jax.data.media.documents import INDEX, OPTION, Documents
from megatransformer_jax.data.media.images import Digits, ImageFitter, ImageFolder, Photographs
from megatransformer_jax.data.media.records import AudioSource, ImageSource, MediaFormats
from megatransformer_jax.data.media.rows import TextPieces, task_names
from megatransformer_jax.data.media.sounds import AudioFolder, Tones, WaveformFitter
from megatransformer_jax.data.media.speech import espeak_is_installed, speech, spoken_digits
from megatransformer_jax.data.media.tfds import TfdsAudio, TfdsImages
from megatransformer_jax.data.sources.record import EmbeddedText, Records, hold_out
from megatransformer_jax.data.tokenizer import Tokenizer


def build_media_sources(
    config: DataConfig, tokenizer: Tokenizer, formats: MediaFormats, split: str
) -> dict[str, Records[typing.Any]]:
    """The sources 'images', 'audio', 'documents' and 'text' that the tasks need.

    Raises:
      UserError: if one cannot be read.
    """
    sources: dict[str, Records[typing.Any]] = {}
    if config.media.has_images:
        sources["images"] = build_image_source(config, formats.image, split)
    if config.media.has_audio:
        sources["audio"] = build_audio_source(config, formats.audio.mel, split)
    if config.media.has_documents:
        everything = Documents(config.media.documents, formats)
        more = f"Put two or more lines into {INDEX}."
        sources["documents"] = _part(everything, config, split, OPTION, more)
    if "text" in task_names(config):
        documents = _part(EmbeddedText(), config, split)
        sources["text"] = TextPieces(documents, tokenizer, config.sequence_length)
    return sources


def build_image_source(
    config: DataConfig | PictureDataConfig, image: ImageConfig, split: str
) -> ImageSource:
    """The images of a split, 'train' or 'validation', at the model's size.

    Raises:
      UserError: if they cannot be read, or there are too few to hold any out.
    """
    options = config.media.images
    match options.source:
        case "digits":
            everything: ImageSource = Digits(image, options.caption_style, options.on_wrong_size)
        case "photographs":
            everything = Photographs(image, options.num_crops, config.seed)
        case "image_folder":
            assert options.folder is not None  # A rule of the configuration.
            everything = ImageFolder(options.folder, ImageFitter(image, options.on_wrong_size))
        case "tfds":
            everything = TfdsImages(
                options, _tfds_split(options, split), ImageFitter(image, options.on_wrong_size)
            )
            if options.tfds_validation_split is not None:
                return everything
        case unknown:
            raise ConfigError("data.media.images.source", f"{unknown!r} has no images.")
    return _part(everything, config, split, *_option_with_records(options, "data.media.images"))


def audio_source_name(config: DataConfig | ClipDataConfig) -> str:
    """`data.media.audio.source`, with what 'auto' means on this machine."""
    chosen = config.media.audio.source
    if chosen != "auto":
        return chosen
    return "spoken_digits" if espeak_is_installed() else "tones"


def build_audio_source(
    config: DataConfig | ClipDataConfig, mel: MelConfig, split: str
) -> AudioSource:
    """The clips of a split, 'train' or 'validation', mono at the rate of `mel`.

    Raises:
      UserError: if they cannot be read, there are too few to hold any out, or espeak-ng is needed
        and missing.
    """
    options, rate = config.media.audio, mel.sample_rate_hz
    name = audio_source_name(config)
    if options.source == "auto":
        logging.info(
            "data.media.audio.source='auto' is %r: espeak-ng is %sinstalled",
            name,
            "" if espeak_is_installed() else "not ",
        )
    match name:
        case "spoken_digits":
            everything: AudioSource = spoken_digits(options, rate)
        case "speech":
            everything = speech(options, rate)
        case "tones":
            everything = Tones(options.num_tones, rate, config.seed)
        case "audio_folder":
            assert options.folder is not None  # A rule of the configuration.
            fitter = WaveformFitter(rate, options.on_wrong_audio)
            everything = AudioFolder(options.folder, fitter, rate, options.is_voice)
        case "tfds":
            fitter = WaveformFitter(rate, options.on_wrong_audio)
            everything = TfdsAudio(options, _tfds_split(options, split), fitter, rate)
            if options.tfds_validation_split is not None:
                return everything
        case unknown:
            raise ConfigError("data.media.audio.source", f"{unknown!r} has no clips.")
    return _part(everything, config, split, *_option_with_records(options, "data.media.audio"))


def _tfds_split(options: ImageSourceConfig | AudioSourceConfig, split: str) -> str:
    if split == "train":
        return options.tfds_split
    return options.tfds_validation_split or options.tfds_split


def _option_with_records(
    options: ImageSourceConfig | AudioSourceConfig, path: str
) -> tuple[str, str]:
    """The option that decides how many records there are, and how to have two."""
    match options.source:
        case "image_folder" | "audio_folder":
            return f"{path}.folder", "Put two or more files with their texts there."
        case "tfds":
            return (
                f"{path}.tfds_split",
                "Name a split of two or more, or a split to hold out with "
                f"{path}.tfds_validation_split.",
            )
        case _:
            return f"{path}.source", "Choose options that make two or more."


Record = typing.TypeVar("Record")


def _part(
    source: Records[Record],
    config: LoaderConfig,
    split: str,
    option: str = "data.media",
    more: str = "Give two or more.",
) -> Records[Record]:
    """What `data.validation_fraction` leaves to training, or holds out.

    Raises:
      ConfigError: if there are fewer than two records, naming `option`; `more` says what to do.
    """
    if len(source) < 2:
        raise ConfigError(
            option,
            f"the source has {len(source)} record, of which none can be held out for validation. "
            + more,
        )
    train, validation = hold_out(source, config.validation_fraction, config.seed)
    return train if split == "train" else validation
