"""Folders of images or clips with their texts: one JSON lines file, or a text beside each file."""

import dataclasses
import json
import os
import pathlib

from megatransformer_jax.config.option import ConfigError, UserError
from megatransformer_jax.data.sources.record import unreadable


@dataclasses.dataclass(frozen=True)
class FolderFormat:
    """How a folder is laid out.

    Attributes:
      index_file: lines of JSON objects with `media_field` (a path below the folder) and
        `text_field`.
      media_field: the field with the file.
      text_field: the field with the text.
      suffixes: of files that have a .txt of the same name beside them, where there is no index.
      option: for messages.
    """

    index_file: str
    media_field: str
    text_field: str
    suffixes: tuple[str, ...]
    option: str


@dataclasses.dataclass(frozen=True)
class FolderItem:
    """A file, its text (None: a .txt that is not there) and where it is listed."""

    path: str
    text: str | None
    where: str


IMAGE_FOLDER = FolderFormat(
    "captions.jsonl",
    "image",
    "caption",
    (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif"),
    "data.media.images.folder",
)
AUDIO_FOLDER = FolderFormat(
    "transcripts.jsonl",
    "audio",
    "transcript",
    (".wav", ".flac"),
    "data.media.audio.folder",
)


def list_folder(folder: str, layout: FolderFormat) -> list[FolderItem]:
    """The files of a folder in the order of the index, or of their names.

    Raises:
      UserError: if there is no such folder, the index has a line that cannot be used, or nothing
        is in it.
    """
    root = pathlib.Path(os.path.expanduser(folder))
    if not root.is_dir():
        raise ConfigError(layout.option, f"{folder!r} is no folder. Correct the path.")
    index = root / layout.index_file
    items = _indexed(index, layout) if index.is_file() else _paired(root, layout)
    if not items:
        raise ConfigError(
            layout.option,
            f"{folder!r} has neither {layout.index_file} with lines in it nor files "
            f"{', '.join(layout.suffixes)} with a .txt beside each. Put them there.",
        )
    return items


def folder_files(folder: str, layout: FolderFormat) -> list[str]:
    """Every file that decides what the folder says: the index or the texts, and the media."""
    root = pathlib.Path(os.path.expanduser(folder))
    items = list_folder(folder, layout)
    texts = [str(root / layout.index_file)]
    if not (root / layout.index_file).is_file():
        texts = [str(_text_path(pathlib.Path(item.path))) for item in items]
    return [path for path in (*texts, *(item.path for item in items)) if os.path.isfile(path)]


def _indexed(index: pathlib.Path, layout: FolderFormat) -> list[FolderItem]:
    try:
        lines = index.read_text(encoding="utf-8-sig").splitlines()
    except OSError as error:
        raise unreadable(str(index), error) from error
    except UnicodeDecodeError as error:
        raise UserError(f"{index}: is not UTF-8 ({error.reason}). Convert it.") from error
    items = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{index}, line {number}"
        wanted = f'{{"{layout.media_field}": file, "{layout.text_field}": text}}'
        try:
            record = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            raise UserError(f"{where}: not valid JSON ({error}). Write {wanted}.") from error
        fields = record if isinstance(record, dict) else {}
        file, text = fields.get(layout.media_field), fields.get(layout.text_field)
        if not (isinstance(file, str) and isinstance(text, str) and file and text):
            raise UserError(f"{where}: {line.strip()[:80]!r} is not {wanted}. Mend the line.")
        items.append(FolderItem(str(index.parent / file), text, where))
    return items


def _paired(root: pathlib.Path, layout: FolderFormat) -> list[FolderItem]:
    """Files with the right ending anywhere below the folder; their texts are read later."""
    paths = sorted(path for path in root.rglob("*") if path.suffix.lower() in layout.suffixes)
    return [FolderItem(str(path), None, str(path)) for path in paths]


def _text_path(path: pathlib.Path) -> pathlib.Path:
    return path.with_suffix(".txt")


def item_text(item: FolderItem) -> str:
    """The text of an item; a .txt without the white space around it.

    Raises:
      ValueError: if there is none; the message says why and how to mend it.
    """
    if item.text is not None:
        return item.text
    path = _text_path(pathlib.Path(item.path))
    try:
        text = path.read_text(encoding="utf-8-sig").strip()
    except OSError as error:
        raise ValueError(
            f"its text {path.name} cannot be read ({error.strerror or error}). Put it beside the "
            "file."
        ) from error
    except UnicodeDecodeError as error:
        raise ValueError(f"its text {path.name} is not UTF-8. Convert it.") from error
    if not text:
        raise ValueError(f"its text {path.name} is empty. Write what the file shows or says.")
    return text
