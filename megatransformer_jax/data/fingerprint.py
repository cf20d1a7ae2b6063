"""Tells cheaply whether the corpus of an earlier run is still the same: its text, its media.

The configuration names files, not what is in them. A line appended to one of them changes the
order of all documents and which of them are held out, so a run must not go on over it unseen.
"""

import hashlib
import os
import typing
from collections.abc import Sequence
from typing import Any

from megatransformer_jax.config.data import (
    FILE_SOURCES,
    ClipDataConfig,
    DataConfig,
    LoaderConfig,
    PictureDataConfig,
)
from megatransformer_jax.config.media_data import AudioSourceConfig, ImageSourceConfig
from megatransformer_jax.data.augmentation.text import read_synonyms
from megatransformer_jax.data.media.build import audio_source_name
from megatransformer_jax.data.media.documents import document_files
from megatransformer_jax.data.media.folders import AUDIO_FOLDER, IMAGE_FOLDER, folder_files
from megatransformer_jax.data.media.speech import espeak_version
from megatransformer_jax.data.sources.build import open_records, source_files
from megatransformer_jax.data.sources.record import open_file, unreadable
from megatransformer_jax.data.sources.tfds import open_tfds
from megatransformer_jax.data.token_rows import prepared_fingerprint
from megatransformer_jax.extras import import_extra
from megatransformer_jax.storage import file_system, is_bucket_path

# A corpus of many gigabytes must not delay every start, so about this much is read of all files
# together, but at least four blocks of each.
SAMPLED_BYTES = 64 << 20
BLOCK_BYTES = 16 << 10
MIN_BLOCKS = 4
SAMPLED_RECORDS = 256


def data_fingerprint(config: LoaderConfig) -> str:
    """The content of training and validation data and of the synonyms, in words for a message.

    The same content gives the same words wherever the files are, except that files in a bucket
    give others than on this machine: of them only size and checksum are asked for. A corpus of
    files of more than 64 MiB is sampled, and so is a TFDS data set: a change that keeps the size
    of each file (the number of records), and touches no sampled place, stays unseen.

    Raises:
      UserError: if the data cannot be read.
    """
    match config:
        case ClipDataConfig():
            return f"audio: {_of_audio(audio_source_name(config), config.media.audio, _of_files)}"
        case PictureDataConfig():
            return f"images: {_of_images(config.media.images, _of_files)}"
    assert isinstance(config, DataConfig)  # There are no others.
    match config.task:
        case "reasoning":
            return "generated problems"
        case "media":
            words = media_fingerprint(config, _of_files)
        case _ if config.source == "tokens":
            return prepared_fingerprint(config.files)
        case _:
            words = split_fingerprint(config, "train")
            if config.validation_files or config.tfds_validation_split is not None:
                words += f"; validation: {split_fingerprint(config, 'validation')}"
    synonyms_file = config.augmentation.synonyms_file
    if synonyms_file is not None:
        read_synonyms(synonyms_file)  # Its error names the option of this file.
        words += f"; synonyms: {_of_files([os.path.expanduser(synonyms_file)])}"
    return words


def split_fingerprint(config: DataConfig, split: str) -> str:
    """As `data_fingerprint`, of the files or the TFDS split that 'train' or 'validation' names."""
    if config.source in FILE_SOURCES:
        return _of_files(source_files(config, split))
    records = open_records(config, split)
    count = len(records)
    # Index 0, the last one, and others evenly between them.
    samples = min(count, SAMPLED_RECORDS)
    indices = [number * (count - 1) // max(samples - 1, 1) for number in range(samples)]
    digest = hashlib.sha256()
    for index in indices:
        _add(digest, str(records[index]).encode("utf-8", "surrogatepass"))
    return f"{count} records, sha256 {digest.hexdigest()[:16]}"


def training_text_identity(config: DataConfig) -> dict[str, Any]:
    """What decides the texts of the training split: options and content, ready for JSON.

    Raises:
      UserError: if the data cannot be read.
    """
    identity: dict[str, Any] = {"data.source": config.source}
    if config.source in ("jsonl", "parquet", "tfds"):
        identity["data.text_field"] = config.text_field
    if config.source == "tfds":
        identity["data.tfds_name"] = config.tfds_name
        identity["data.tfds_split"] = config.tfds_split
    if not config.validation_files and config.tfds_validation_split is None:
        identity["data.validation_fraction"] = config.validation_fraction
        identity["data.seed"] = config.seed
    identity["training data"] = split_fingerprint(config, "train")
    return identity


def _of_files(paths: Sequence[str]) -> str:
    """Number of files, their bytes, and a hash of their sizes and content in this order."""
    blocks = max(SAMPLED_BYTES // BLOCK_BYTES // len(paths), MIN_BLOCKS)
    digest = hashlib.sha256()
    total = 0
    for path in paths:
        if is_bucket_path(path):
            size, identity = _of_object(path)
            total += size
            digest.update(f"{size}:{identity}".encode())
            continue
        with open_file(path) as file:
            size = file.seek(0, os.SEEK_END)
            total += size
            digest.update(f"{size}:".encode())
            if size <= blocks * BLOCK_BYTES:
                file.seek(0)
                digest.update(file.read())
                continue
            for block in range(blocks):  # The first is the head, the last one the tail.
                file.seek(block * (size - BLOCK_BYTES) // (blocks - 1))
                digest.update(file.read(BLOCK_BYTES))
    return f"{len(paths)} files, {total} bytes, sha256 {digest.hexdigest()[:16]}"


def _of_object(path: str) -> tuple[int, str]:
    """Size of an object, and what the bucket knows of its content: nothing of it is read."""
    try:
        about = file_system(path).info(path)
    except Exception as error:  # Of the client: of HTTP, of credentials.
        raise unreadable(path, error) from error
    # Checksums come first: they stay when the object is copied.
    known = (about.get(name) for name in ("md5Hash", "crc32c", "ETag", "etag", "generation"))
    return int(about["size"]), next((str(value) for value in known if value), "")


def _add(digest: Any, content: bytes) -> None:
    digest.update(f"{len(content)}:".encode())
    digest.update(content)


# ------------------------------------------------------------------------------
# The same for media.


def media_fingerprint(
    config: DataConfig, fingerprint_files: typing.Callable[[list[str]], str]
) -> str:
    """What decides the media in addition to the configuration, in words for a message.

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
    if media.documents.folder is not None:
        files = document_files(media.documents.folder)
        parts.append(f"documents: {fingerprint_files(files)}")
    return "; ".join(parts) or "embedded text"


def _of_images(
    options: ImageSourceConfig, fingerprint_files: typing.Callable[[list[str]], str]
) -> str:
    if options.source == "tfds":
        return _of_tfds(options, "data.media.images.source")
    if options.source == "image_folder":
        assert options.folder is not None  # A rule of the configuration.
        return fingerprint_files(folder_files(options.folder, IMAGE_FOLDER))
    sklearn = import_extra("sklearn", "media", "images of scikit-learn")
    return f"{options.source} of scikit-learn {sklearn.__version__.split('.', maxsplit=1)[0]}"


def _of_audio(
    name: str, options: AudioSourceConfig, fingerprint_files: typing.Callable[[list[str]], str]
) -> str:
    if name == "tfds":
        return _of_tfds(options, "data.media.audio.source")
    if name == "audio_folder":
        assert options.folder is not None  # A rule of the configuration.
        return fingerprint_files(folder_files(options.folder, AUDIO_FOLDER))
    return name if name == "tones" else f"{name} by {espeak_version()}"


def _of_tfds(options: ImageSourceConfig | AudioSourceConfig, option: str) -> str:
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
