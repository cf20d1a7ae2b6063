"""Sources of documents in files: plain text, JSON lines, Parquet, ArrayRecord."""

import codecs
import functools
import json
import mmap
import re
import typing
from typing import Any

import grain
import numpy as np
from array_record.python import array_record_module

from megatransformer_jax.config.option import UserError
from megatransformer_jax.data.sources.record import (
    BadRecord,
    decoded,
    open_file,
    read_bytes,
    text_of,
    unreadable,
)
from megatransformer_jax.extras import import_extra
from megatransformer_jax.failures import check_answered, may_pass
from megatransformer_jax.storage import file_system, is_bucket_path

# ------------------------------------------------------------------------------
# Plain text files, cut at empty lines into documents of a moderate size.

MINIMUM_BYTES = 16 * 1024
MAXIMUM_BYTES = 64 * 1024
CUTS = (re.compile(rb"\r?\n[ \t]*\r?\n"), re.compile(rb"\n"), re.compile(rb" "))


class TextFile:
    """A text file as documents; together they are the file, byte for byte.

    A file of up to 16 KiB is one document. A longer one is cut at the first blank line after
    every 16 KiB, so that it can be shuffled, held out and tokenised piece by piece. Where 48 KiB
    pass without a blank line, the cut is at the first line end there, else at a space, else
    between two characters.
    """

    def __init__(self, path: str):
        self._path = path
        self._bounds = _document_bounds(path)

    def __len__(self) -> int:
        return len(self._bounds) - 1

    def __getitem__(self, index: int) -> str | BadRecord:
        start, end = (int(bound) for bound in self._bounds[index : index + 2])
        raw = read_bytes(self._path, start, end)
        return decoded(raw, f"{self._path}, bytes {start} to {end}")


def _document_bounds(path: str) -> np.ndarray:
    """Byte offsets at which documents start, and the end of the file."""
    bounds = [0]
    with open_file(path) as file:
        size = file.seek(0, 2)
        if size > MINIMUM_BYTES and is_bucket_path(path):
            while size - bounds[-1] > MINIMUM_BYTES:
                bounds.append(_next_cut_of_object(file, bounds[-1], size))
        elif size > MINIMUM_BYTES:
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                while size - bounds[-1] > MINIMUM_BYTES:
                    bounds.append(_next_cut(content, bounds[-1], size))
    if bounds[-1] != size:
        bounds.append(size)
    return np.array(bounds, np.int64)


def _next_cut_of_object(file: typing.BinaryIO, start: int, size: int) -> int:
    """As `_next_cut`, of a file that cannot be mapped into memory."""
    file.seek(start)
    # One byte more than a document has, by which it is told whether a character is cut.
    content = file.read(MAXIMUM_BYTES + 1)
    return start + _next_cut(content, 0, size - start)


def _next_cut(content: mmap.mmap | bytes, start: int, size: int) -> int:
    """Where the document that begins at `start` ends."""
    low, high = start + MINIMUM_BYTES, min(start + MAXIMUM_BYTES, size)
    for pattern in CUTS:
        found = pattern.search(content, low, high)
        if found:
            return found.end()
    if high == size:
        return size
    # 0b10xxxxxx continues a UTF-8 character, which has at most four bytes.
    for cut in range(high, high - 4, -1):
        if content[cut] & 0xC0 != 0x80:
            return cut
    return high  # not UTF-8 at all; reading the document says so


# ------------------------------------------------------------------------------
# JSON lines: one object per line, its text in a named field.


class JsonlFile:
    """The lines of a .jsonl file; blank lines are not records, nor is a byte order mark."""

    def __init__(self, path: str, field: str):
        self._path = path
        self._field = field
        self._offsets, self._ends, self._line_numbers = _line_index(path)

    def __len__(self) -> int:
        return len(self._offsets)

    def __getitem__(self, index: int) -> str | BadRecord:
        where = f"{self._path}, line {self._line_numbers[index]}"
        raw = read_bytes(self._path, int(self._offsets[index]), int(self._ends[index]))
        line = decoded(raw, where)
        if isinstance(line, BadRecord):
            return line
        try:
            record = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            return BadRecord(where, f"not valid JSON ({error}). Fix or delete the line.")
        if not isinstance(record, dict):
            return BadRecord(
                where,
                f"a JSON {type(record).__name__}, not an object. Write it as "
                f'{{"{self._field}": "..."}}.',
            )
        if self._field not in record:
            fields = ", ".join(map(repr, record)) or "none"
            return BadRecord(
                where,
                f"no field {self._field!r}; its fields: {fields}. Fix the record, or name "
                "another field with data.text_field.",
            )
        return text_of(record[self._field], self._field, where)


def _line_index(path: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """First byte, end and number (from 1) of every line that is not blank."""
    offsets, ends, numbers = [], [], []
    offset = 0
    with open_file(path) as file:
        for number, line in enumerate(file, start=1):
            if offset == 0 and line.startswith(codecs.BOM_UTF8):
                offset = len(codecs.BOM_UTF8)
                line = line[offset:]
            if not line.isspace():
                offsets.append(offset)
                ends.append(offset + len(line))
                numbers.append(number)
            offset += len(line)
    return np.array(offsets, np.int64), np.array(ends, np.int64), np.array(numbers, np.int64)


# ------------------------------------------------------------------------------
# Parquet files: one row per document, its text in a named column.

CACHED_GROUPS = 4


class ParquetFile:
    """The rows of a Parquet file.

    Parquet is read by row groups; the last four stay in memory. Shuffled reading of a file with
    many large row groups decodes a group per record, so write such files with row groups of a few
    thousand rows, or use ArrayRecord.

    Raises:
      UserError: if the file is not a Parquet file, or the column is missing or not text.
    """

    def __init__(self, path: str, column: str):
        self._path = path
        self._column = column
        pyarrow = _pyarrow()
        try:
            with _open_parquet(path) as file:
                schema = file.schema_arrow
                groups = file.metadata.num_row_groups
                self._ends = np.cumsum(
                    [file.metadata.row_group(group).num_rows for group in range(groups)]
                )
        except pyarrow.ArrowInvalid as error:
            raise UserError(
                f"{path}: not a readable Parquet file ({error}). Write it again, or set "
                "data.source to the format it has."
            ) from error
        except Exception as error:
            if not isinstance(error, OSError) and not may_pass(error):
                raise
            raise unreadable(path, error) from error
        _check_column(path, schema, column)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, index: int) -> str | BadRecord:
        where = f"{self._path}, row {index}"
        group = int(np.searchsorted(self._ends, index, side="right"))
        start = int(self._ends[group - 1]) if group else 0
        try:
            return text_of(
                _read_group(self._path, group, self._column)[index - start].as_py(),
                self._column,
                where,
            )
        except UnicodeDecodeError as error:
            return BadRecord(where, f"not UTF-8 ({error.reason}). Write the row again.")
        except Exception as error:
            if is_bucket_path(self._path):
                check_answered(self._path, error)  # Then nothing is wrong with the record.
            if not isinstance(error, (_pyarrow().ArrowException, OSError)):
                raise
            # OSError is what pyarrow raises for a page that cannot be decoded, too.
            return BadRecord(
                where, f"row group {group} cannot be decoded ({error}). Write the file again."
            )


def _check_column(path: str, schema: Any, column: str) -> None:
    if column not in schema.names:
        raise UserError(
            f"{path}: no column {column!r}; its columns: {', '.join(map(repr, schema.names))}. "
            "Name one with data.text_field."
        )
    kind = schema.field(column).type
    types = _pyarrow().types
    if not any(
        check(kind)
        for check in (
            types.is_string,
            types.is_large_string,
            types.is_binary,
            types.is_large_binary,
        )
    ):
        raise UserError(
            f"{path}: column {column!r} is {kind}, not text. Name another with data.text_field, "
            "or write the column as string."
        )


@functools.lru_cache(maxsize=CACHED_GROUPS)
def _read_group(path: str, group: int, column: str) -> Any:
    with _open_parquet(path) as file:
        return file.read_row_group(group, columns=[column]).column(column)


def _open_parquet(path: str) -> Any:
    """The file; of an object only what is asked for is read."""
    if not is_bucket_path(path):
        return _pyarrow().parquet.ParquetFile(path)
    return _pyarrow().parquet.ParquetFile(path.partition("://")[2], filesystem=file_system(path))


def _pyarrow() -> Any:
    """The package, with `pyarrow.parquet`."""
    import_extra("pyarrow.parquet", "parquet", "Parquet files")
    return import_extra("pyarrow", "parquet", "Parquet files")


# ------------------------------------------------------------------------------
# ArrayRecord files: one record per document, UTF-8 text and nothing else.


class ArrayRecordFile:
    """The records of an ArrayRecord file (Riegeli chunks with an index for random access).

    Raises:
      UserError: if the file is not an ArrayRecord file.
    """

    def __init__(self, path: str):
        self._path = path
        try:
            # grain's source reads the number of records without a check of the file.
            array_record_module.ArrayRecordReader(path).close()
            self._records = grain.sources.ArrayRecordDataSource(path)
        except (ValueError, RuntimeError, OSError) as error:
            raise UserError(
                f"{path}: not a readable ArrayRecord file ({error}). Write it again with "
                "array_record, or set data.source to the format it has."
            ) from error

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> str | BadRecord:
        where = f"{self._path}, record {index}"
        try:
            raw = self._records[index]
        except (RuntimeError, ValueError, OSError) as error:
            return BadRecord(where, f"its chunk cannot be read ({error}). Write the file again.")
        return decoded(raw, where)
