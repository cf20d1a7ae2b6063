"""Folders of images or clips with their texts: one JSON lines file, or a text next to each file."""

import dataclasses
import json
import os
import pathlib
from collections.abc import Iterator
from typing import Any

from absl import logging

from megatransformer_jax.config.option import ConfigError, UserError


@dataclasses.dataclass(frozen=True)
class FolderFormat:
    """How a folder is laid out.

    Attributes:
      index_file: lines of JSON objects with `media_field` (a path below the folder) and
        `text_field`.
      media_field: the field with the file.
      text_field: the field with the text.
      suffixes: of files that have a .txt of the same name next to them, where there is no index.
      option: for messages.
    """

    index_file: str
    media_field: str
    text_field: str
    suffixes: tuple[str, ...]
    option: str


@dataclasses.dataclass(frozen=True)
class FolderItem:
    """A file and its text.

    Attributes:
      path: of the file.
      text: None if it is in a .txt next to the file.
      where: it is listed, for messages.
      problem: why there is no record, for a .txt without a file.
    """

    path: str
    text: str | None
    where: str
    problem: str | None = None


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

    Without an index, each .txt that has no file next to it is an item with a `problem`.

    Raises:
      UserError: if there is no such folder, the index has a line that cannot be used (other keys,
        a path that leaves the folder, a file for the second time), or nothing is in it.
    """
    root = pathlib.Path(os.path.expanduser(folder))
    if not root.is_dir():
        raise ConfigError(layout.option, f"{folder!r} is not a folder. Correct the path.")
    index = root / layout.index_file
    items = _indexed(index, layout) if index.is_file() else _paired(root, layout)
    problems = [item for item in items if item.problem is not None]
    if len(items) == len(problems):
        raise ConfigError(
            layout.option,
            f"{folder!r} has neither {layout.index_file} with lines in it nor files "
            f"{', '.join(layout.suffixes)} with a .txt next to each. Put them there."
            + "".join(f" {item.path}: {item.problem}" for item in problems[:1]),
        )
    return items


def folder_files(folder: str, layout: FolderFormat) -> list[str]:
    """Every file that decides what the folder says: the index or the texts, and the media."""
    root = pathlib.Path(os.path.expanduser(folder))
    items = list_folder(folder, layout)
    texts = [str(root / layout.index_file)]
    if not (root / layout.index_file).is_file():
        texts = [str(_text_path(pathlib.Path(item.path))) for item in items]
    paths = dict.fromkeys((*texts, *(item.path for item in items)))
    return [path for path in paths if os.path.isfile(path)]


def _indexed(index: pathlib.Path, layout: FolderFormat) -> list[FolderItem]:
    items = []
    lines_of_files: dict[str, int] = {}
    for number, where, line in read_index(index):
        file, text = _index_line(line, where, layout)
        first = lines_of_files.setdefault(file, number)
        if first != number:
            raise UserError(
                f"{where}: {file!r} is on line {first} already; it could be trained on and held "
                "out at once. Delete one of the lines."
            )
        items.append(FolderItem(str(index.parent / file), text, where))
    return items


def read_index(index: pathlib.Path) -> Iterator[tuple[int, str, str]]:
    """Number, place for messages, and text of each line of a file that is not blank.

    Raises:
      UserError: if the file cannot be read, or is not UTF-8.
    """
    try:
        # Not splitlines(), which also parts texts at U+2028 and the like.
        lines = index.read_text(encoding="utf-8-sig").split("\n")
    except OSError as error:
        raise UserError(
            f"{index}: cannot be read ({error.strerror or error}). Make it readable."
        ) from error
    except UnicodeDecodeError as error:
        raise UserError(f"{index}: is not UTF-8 ({error.reason}). Convert it.") from error
    for number, line in enumerate(lines, start=1):
        if line.strip():
            yield number, f"{index}, line {number}", line


def _index_line(line: str, where: str, layout: FolderFormat) -> tuple[str, str]:
    """The file's path below the folder in its shortest form, and the text."""
    names = (layout.media_field, layout.text_field)
    wanted = f'{{"{names[0]}": file, "{names[1]}": text}}'
    record = parse_line(line, where, wanted)
    fields = record if isinstance(record, dict) else {}
    unknown = [key for key in fields if key not in names]
    if unknown:
        raise UserError(
            f"{where}: unknown key {unknown[0]!r}; a line has {names[0]!r} and {names[1]!r}. "
            "Correct it, or leave it out."
        )
    file, text = (fields.get(name) for name in names)
    if not (isinstance(file, str) and isinstance(text, str) and file.strip() and text.strip()):
        raise UserError(f"{where}: {line.strip()[:80]!r} is not {wanted}. Fix the line.")
    return path_below(file, where), text


def parse_line(line: str, where: str, wanted: str) -> Any:
    """The JSON value of a line.

    Raises:
      UserError: if it is not JSON; the message shows what is `wanted`.
    """
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not valid JSON ({error}). Write {wanted}.") from error


def path_below(file: str, where: str) -> str:
    """A path below the folder in its shortest form.

    Raises:
      UserError: if it leaves the folder, or cannot be the name of a file.
    """
    short = os.path.normpath(file)
    if os.path.isabs(file) or short.split(os.sep)[0] == os.pardir:
        raise UserError(
            f"{where}: {file!r} is outside the folder; paths are relative to it and stay below it. "
            "Put the file into the folder, or link to it there."
        )
    try:
        file.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(f"{where}: {file!r} cannot be a file's name. Fix the line.") from error
    if "\0" in file:
        raise UserError(f"{where}: {file!r} cannot be a file's name. Fix the line.")
    return short


def _paired(root: pathlib.Path, layout: FolderFormat) -> list[FolderItem]:
    """Files with the right ending anywhere below the folder, whose texts are read later; and each
    .txt that has none next to it, which is a bad record."""
    everything = sorted(path for path in root.rglob("*") if not path.is_dir())
    media = [path for path in everything if path.suffix.lower() in layout.suffixes]
    items = [FolderItem(str(path), None, str(path)) for path in media]
    served = {_text_path(path) for path in media}
    beside: dict[pathlib.Path, list[str]] = {}
    for path in everything:
        beside.setdefault(path.with_suffix(""), []).append(path.name)
    for path in everything:
        if path.suffix.lower() == ".txt" and path not in served:
            others = [name for name in beside[path.with_suffix("")] if name != path.name]
            found = f"only {', '.join(others)}" if others else "nothing"
            problem = (
                f"next to this text is {found}, no file of its name that is read: "
                f"{', '.join(layout.suffixes)}. Convert the file or put it there, or move the text "
                "out of the folder."
            )
            items.append(FolderItem(str(path), None, str(path), problem))
    return items


def _text_path(path: pathlib.Path) -> pathlib.Path:
    return path.with_suffix(".txt")


def item_text(item: FolderItem) -> str:
    """The text of an item whose file is there; a .txt without the white space around it.

    Raises:
      ValueError: if either is missing, or the text cannot be used; the message says why and how
        to fix it.
    """
    if item.problem is not None:
        raise ValueError(item.problem)
    if not os.path.isfile(item.path):
        correct = "Correct the line" if item.text is not None else "Delete its text"
        raise ValueError(f"there is no such file. {correct}, or put the file there.")
    if item.text is not None:
        check_text(item.text)
        return item.text
    return _read_text(_text_path(pathlib.Path(item.path)))


def check_text(text: str) -> None:
    """JSON can spell halves of a character, which no tokenizer can encode.

    Raises:
      ValueError: if the text has one; the message says where.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"its text has a lone surrogate, {text[error.start]!r}, at character {error.start}, "
            "which is not text. Fix the line."
        ) from error


def _read_text(path: pathlib.Path) -> str:
    try:
        text = path.read_text(encoding="utf-8-sig").strip()
    except OSError as error:
        raise ValueError(
            f"its text {path.name} cannot be read ({error.strerror or error}). Put it next to the "
            "file."
        ) from error
    except UnicodeDecodeError as error:
        raise ValueError(f"its text {path.name} is not UTF-8. Convert it.") from error
    if not text:
        raise ValueError(f"its text {path.name} is empty. Write what the file shows or says.")
    return text


# ------------------------------------------------------------------------------
# A log line that says how often data were changed to fit.


class CountedNote:
    """Tells in the log how often something was changed: the 1st, 2nd, 4th, 8th, ... time."""

    def __init__(self, words: str):
        self._words = words
        self.count = 0

    # So that the log names the caller's file, which says what was changed.
    @logging.skip_log_prefix
    def add(self, where: str) -> None:
        """Counts one, the latest of which is at `where`."""
        self.count += 1
        if self.count & (self.count - 1) == 0:
            logging.info("%d %s; the latest: %s", self.count, self._words, where)
