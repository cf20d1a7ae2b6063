"""What a source yields, sources made of sources, and the embedded English text."""

import contextlib
import dataclasses
import typing
from collections.abc import Iterator
from pydoc_data.topics import topics

import numpy as np
from absl import logging

from megatransformer_jax import streams
from megatransformer_jax.config.option import ConfigError, UserError
from megatransformer_jax.failures import check_reached, may_pass
from megatransformer_jax.storage import file_system, is_bucket_path

# ------------------------------------------------------------------------------
# Records.


class BadRecordError(UserError):
    """A record that cannot be used, with `data.on_bad_record='error'`."""


@dataclasses.dataclass(frozen=True)
class BadRecord:
    """Stands in for the text of a record that cannot be used.

    It is a value and not an exception so that worker processes can hand it to the training
    process, where all are counted in one place.
    """

    where: str  # "corpus.jsonl, line 17"
    problem: str  # what is wrong, and how to fix it

    def __str__(self) -> str:
        return f"{self.where}: {self.problem}"


class TextSource(typing.Protocol):
    """Documents by number. Sources pickle, so that worker processes can have one each."""

    def __len__(self) -> int:
        """Number of records, good or bad."""
        ...

    def __getitem__(self, index: int) -> str | BadRecord:
        """The text of a record."""
        ...


class BadRecordPolicy:
    """Does what `data.on_bad_record` says, and remembers what was skipped.

    Each place counts once, however many epochs pass it.
    """

    def __init__(self, on_bad_record: str):
        self._raises = on_bad_record == "error"
        self._places: set[str] = set()
        self.first: BadRecord | None = None

    @property
    def count(self) -> int:
        """Different records skipped so far."""
        return len(self._places)

    def handle(self, record: BadRecord) -> None:
        """Raises for the record or counts it; the log shows the 1st, 2nd, 4th, 8th, ... count.

        Raises:
          BadRecordError: with on_bad_record='error'.
        """
        if self._raises:
            raise BadRecordError(
                f"{record} To leave out such records, set data.on_bad_record='skip'."
            )
        if record.where in self._places:
            return
        self._places.add(record.where)
        self.first = self.first or record
        if self.count & (self.count - 1) == 0:
            logging.warning("%d bad records skipped; the first: %s", self.count, self.first)


# An object is read in blocks, so that going through one takes few requests.
_BLOCK_BYTES = 8 << 20


@contextlib.contextmanager
def open_file(path: str) -> Iterator[typing.BinaryIO]:
    """A data file, of this machine or in a bucket, opened to be read from start to end.

    Raises:
      UserError: if it cannot be opened or read.
      NoAnswer: if its bucket does not answer.
    """
    try:
        if is_bucket_path(path):
            options = {"cache_type": "readahead", "block_size": _BLOCK_BYTES}
            with file_system(path).open(path, "rb", **options) as file:
                yield file
        else:
            with open(path, "rb") as file:
                yield file
    except Exception as error:
        # Clients of buckets have errors of their own.
        if not isinstance(error, OSError) and not may_pass(error):
            raise
        raise unreadable(path, error) from error


def read_bytes(path: str, start: int, end: int) -> bytes:
    """The bytes from `start` to before `end` of a data file; of an object by one request.

    Raises:
      UserError: if they cannot be read.
    """
    if not is_bucket_path(path):
        with open_file(path) as file:
            file.seek(start)
            return file.read(end - start)
    try:
        return file_system(path).cat_file(path, start=start, end=end)
    except Exception as error:  # Of the client: of HTTP, of credentials.
        raise unreadable(path, error) from error


def unreadable(path: str, error: Exception) -> UserError:
    """The error for a file that the system, or its bucket, does not let us read.

    Raises:
      NoAnswer: instead, if the bucket does not answer.
    """
    check_reached(path, error)
    reason = getattr(error, "strerror", None) or error
    return UserError(
        f"{path}: cannot be read ({reason}). Make it readable, or name other files with data.files "
        "and data.validation_files."
    )


def decoded(raw: bytes, where: str) -> str | BadRecord:
    """UTF-8 bytes as text."""
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        return BadRecord(
            where,
            f"byte 0x{raw[error.start]:02x} at offset {error.start} is not UTF-8. Convert the "
            "data, for example with `iconv -f latin1 -t utf-8`.",
        )


def text_of(value: typing.Any, field: str, where: str) -> str | BadRecord:
    """The value of a text field; bytes must be UTF-8."""
    if isinstance(value, str):
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            return BadRecord(
                where,
                f"field {field!r} has a lone surrogate, {value[error.start]!r}, at character "
                f"{error.start}, which is not text. Fix the record.",
            )
        return value
    if isinstance(value, bytes):
        return decoded(value, where)
    return BadRecord(
        where,
        f"field {field!r} is {type(value).__name__}, not text. Fix the record, or name "
        "another field with data.text_field.",
    )


# ------------------------------------------------------------------------------
# Sources made of sources.


class Concatenated:
    """The records of several sources, one source after the other."""

    def __init__(self, sources: list[TextSource]):
        self._sources = sources
        self._ends = np.cumsum([len(source) for source in sources])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> str | BadRecord:
        number = int(np.searchsorted(self._ends, index, side="right"))
        start = self._ends[number - 1] if number else 0
        return self._sources[number][int(index - start)]


Record = typing.TypeVar("Record")
Record_co = typing.TypeVar("Record_co", covariant=True)


class Records(typing.Protocol[Record_co]):
    """Records of any kind by number."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Record_co: ...


class Subset(typing.Generic[Record]):
    """Some records of a source."""

    def __init__(self, source: Records[Record], indices: np.ndarray):
        self._source = source
        self._indices = indices

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> Record:
        return self._source[int(self._indices[index])]


def hold_out(
    source: Records[Record], fraction: float, seed: int
) -> tuple[Subset[Record], Subset[Record]]:
    """Training and validation records. Whole records are drawn at random from the seed.

    Raises:
      ConfigError: if there are fewer than two records, as neither part may be empty.
    """
    size = len(source)
    if size < 2:
        raise ConfigError(
            "data.validation_fraction",
            f"{fraction} of a corpus of one document cannot be held out; split it into more "
            "documents or give a validation source (data.validation_files, or "
            "data.tfds_validation_split).",
        )
    held_out = min(max(round(size * fraction), 1), size - 1)
    rng = np.random.Generator(np.random.Philox(key=np.array([seed, streams.SPLIT], np.uint64)))
    order = rng.permutation(size)
    return Subset(source, np.sort(order[held_out:])), Subset(source, np.sort(order[:held_out]))


# ------------------------------------------------------------------------------
# English prose that every CPython carries: the help texts of the language reference.


class EmbeddedText:
    """The documents of `pydoc_data.topics`, about 80, in the order of their names."""

    def __init__(self) -> None:
        self._texts = [topics[name] for name in sorted(topics)]

    def __len__(self) -> int:
        return len(self._texts)

    def __getitem__(self, index: int) -> str | BadRecord:
        return self._texts[index]
