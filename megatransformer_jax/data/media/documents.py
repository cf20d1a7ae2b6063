"""Documents of a folder that mix text with several images and clips, in any order."""

import os
import pathlib
from collections.abc import Iterator
from typing import Any

from megatransformer_jax.config.media_data import DocumentsDataConfig
from megatransformer_jax.config.option import ConfigError, UserError
from megatransformer_jax.data.media.folders import check_text, parse_line, path_below, read_index
from megatransformer_jax.data.media.images import ImageFitter, read_image
from megatransformer_jax.data.media.records import (
    AudioPart,
    Given,
    ImagePart,
    MediaFormats,
    Part,
    Sample,
)
from megatransformer_jax.data.media.sounds import WaveformFitter, read_clip
from megatransformer_jax.data.sources.record import BadRecord

INDEX = "documents.jsonl"
SECTION = "data.media.documents"
OPTION = f"{SECTION}.folder"
# Keys of a part with a file, by what it holds. Of sound they say which tokens stand around it.
MEDIA_KEYS = ("image", "voice", "audio")
WANTED = (
    'a list of texts and of {"given": text}, {"image": file}, {"voice": file} or {"audio": file}, '
    'with "target": true for a medium to make'
)


class Documents:
    """One sample per line of documents.jsonl. Files are read when a document is asked for.

    Raises:
      UserError: if there is no such folder or index, or it has a line that cannot be used.
    """

    def __init__(self, options: DocumentsDataConfig, formats: MediaFormats):
        assert options.folder is not None  # A rule of the configuration.
        self._documents = list(_documents(options.folder))
        self._root = _root(options.folder)
        self._images = ImageFitter(formats.image, options.on_wrong_size, SECTION)
        self._rate = formats.audio.mel.sample_rate_hz
        self._clips = WaveformFitter(self._rate, options.on_wrong_audio, SECTION)

    def __len__(self) -> int:
        return len(self._documents)

    def __getitem__(self, index: int) -> Sample | BadRecord:
        where, parts = self._documents[index]
        found = []
        for part in parts:
            made = self._part(part, where)
            if isinstance(made, BadRecord):
                return made
            found.append(made)
        return Sample(tuple(found), where)

    def _part(self, part: str | dict[str, Any], line: str) -> Part | Given | BadRecord:
        if isinstance(part, str):
            return part
        if "given" in part:
            return Given(part["given"])
        key = next(key for key in MEDIA_KEYS if key in part)
        path, is_target = str(self._root / part[key]), part.get("target", False)
        where = f"{path} ({line})"
        if not os.path.isfile(path):
            return BadRecord(where, "there is no such file. Correct the line, or put it there.")
        if key == "image":
            pixels = read_image(path, self._images, where)
            return pixels if isinstance(pixels, BadRecord) else ImagePart(pixels, is_target)
        waveform = read_clip(path, self._clips, where)
        if isinstance(waveform, BadRecord):
            return waveform
        return AudioPart(waveform, self._rate, key == "voice", is_target)


def document_files(folder: str) -> list[str]:
    """Every file that decides what the documents say: the index, and the media that there are."""
    root = _root(folder)
    media = (
        str(root / part[key])
        for _, parts in _documents(folder)
        for part in parts
        for key in MEDIA_KEYS
        if isinstance(part, dict) and key in part
    )
    return [str(root / INDEX), *filter(os.path.isfile, dict.fromkeys(media))]


def _root(folder: str) -> pathlib.Path:
    return pathlib.Path(os.path.expanduser(folder))


def _documents(folder: str) -> Iterator[tuple[str, list[Any]]]:
    """Place and parts of each document; paths are below the folder, in their shortest form."""
    index = _root(folder) / INDEX
    if not index.is_file():
        raise ConfigError(
            OPTION, f"{folder!r} has no file {INDEX}. Correct the path, or put the file there."
        )
    for _, where, line in read_index(index):
        parts = parse_line(line, where, WANTED)
        if not (isinstance(parts, list) and parts):
            raise UserError(f"{where}: {line.strip()[:80]!r} is not {WANTED}. Fix the line.")
        yield where, [_checked(part, where) for part in parts]


def _checked(part: Any, where: str) -> Any:
    """The part, its path in the shortest form.

    Raises:
      UserError: if it is neither a text nor a file with its kind.
    """
    if isinstance(part, str):
        return _checked_text(part, where)
    fields = part if isinstance(part, dict) else {}
    unknown = [key for key in fields if key not in ("given", *MEDIA_KEYS, "target")]
    if unknown:
        raise UserError(
            f"{where}: unknown key {unknown[0]!r}; a part has one of 'given', "
            f"{', '.join(map(repr, MEDIA_KEYS))}, and a medium may have 'target'. Correct it, or "
            "leave it out."
        )
    key = next((key for key in ("given", *MEDIA_KEYS) if key in fields), "")
    value = fields.get(key)
    is_whole = set(fields) <= ({"given"} if key == "given" else {key, "target"})
    if not (is_whole and isinstance(value, str) and value.strip()):
        raise UserError(f"{where}: the part {str(part)[:80]} is not of {WANTED}. Fix the line.")
    if key == "given":
        return {key: _checked_text(value, where)}
    if not isinstance(fields.get("target", False), bool):
        raise UserError(
            f"{where}: 'target' is {fields['target']!r}; it must be true or false. Fix the line."
        )
    return fields | {key: path_below(value, where)}


def _checked_text(text: str, where: str) -> str:
    if not text:
        raise UserError(f"{where}: a text is empty. Leave it out.")
    try:
        check_text(text)
    except ValueError as error:
        raise UserError(f"{where}: {error}") from None
    return text
