"""Parquet files: one row per document, its text in a named column."""

import functools

import numpy as np
import pyarrow
import pyarrow.parquet

from megatransformer_jax.config.option import UserError
from megatransformer_jax.data.sources.record import BadRecord, text_of, unreadable

CACHED_GROUPS = 4


class ParquetFile:
    """The rows of a Parquet file.

    Parquet is read by row groups; the last four stay in memory. Shuffled reading of a file with
    many large row groups decodes a group per record, so write such files with row groups of a few
    thousand rows, or use ArrayRecord.

    Raises:
      UserError: if the file is no Parquet file, or the column is missing or not text.
    """

    def __init__(self, path: str, column: str):
        self._path = path
        self._column = column
        try:
            with pyarrow.parquet.ParquetFile(path) as file:
                schema = file.schema_arrow
                groups = file.metadata.num_row_groups
                self._ends = np.cumsum(
                    [file.metadata.row_group(group).num_rows for group in range(groups)]
                )
        except pyarrow.ArrowInvalid as error:
            raise UserError(
                f"{path}: not a readable Parquet file ({error}). Write it anew, or set "
                "data.source to the format it has."
            ) from error
        except OSError as error:
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
            return BadRecord(where, f"not UTF-8 ({error.reason}). Write the row anew.")
        except (pyarrow.ArrowException, OSError) as error:
            # OSError is what pyarrow raises for a page that cannot be decoded, too.
            return BadRecord(
                where, f"row group {group} cannot be decoded ({error}). Write the file anew."
            )


def _check_column(path: str, schema: pyarrow.Schema, column: str) -> None:
    if column not in schema.names:
        raise UserError(
            f"{path}: no column {column!r}; its columns: {', '.join(map(repr, schema.names))}. "
            "Name one with data.text_field."
        )
    kind = schema.field(column).type
    types = pyarrow.types
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
def _read_group(path: str, group: int, column: str) -> pyarrow.ChunkedArray:
    with pyarrow.parquet.ParquetFile(path) as file:
        return file.read_row_group(group, columns=[column]).column(column)
