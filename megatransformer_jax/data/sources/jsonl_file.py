"""JSON lines: one object per line, its text in a named field."""

import codecs
import json

import numpy as np

from megatransformer_jax.data.sources.record import BadRecord, decoded, open_file, text_of


class JsonlFile:
    """The lines of a .jsonl file; blank lines are no records, nor is a byte order mark."""

    def __init__(self, path: str, field: str):
        self._path = path
        self._field = field
        self._offsets, self._line_numbers = _line_index(path)

    def __len__(self) -> int:
        return len(self._offsets)

    def __getitem__(self, index: int) -> str | BadRecord:
        where = f"{self._path}, line {self._line_numbers[index]}"
        with open_file(self._path) as file:
            file.seek(int(self._offsets[index]))
            line = decoded(file.readline(), where)
        if isinstance(line, BadRecord):
            return line
        try:
            record = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            return BadRecord(where, f"not valid JSON ({error}). Mend or delete the line.")
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
                f"no field {self._field!r}; its fields: {fields}. Mend the record, or name "
                "another field with data.text_field.",
            )
        return text_of(record[self._field], self._field, where)


def _line_index(path: str) -> tuple[np.ndarray, np.ndarray]:
    """Byte offset and number (from 1) of every line that is not blank."""
    offsets, numbers = [], []
    offset = 0
    with open_file(path) as file:
        for number, line in enumerate(file, start=1):
            if offset == 0 and line.startswith(codecs.BOM_UTF8):
                offset = len(codecs.BOM_UTF8)
                line = line[offset:]
            if not line.isspace():
                offsets.append(offset)
                numbers.append(number)
            offset += len(line)
    return np.array(offsets, np.int64), np.array(numbers, np.int64)
