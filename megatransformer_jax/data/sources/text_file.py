"""Plain text files, cut at blank lines into documents of a moderate size."""

import mmap
import re

import numpy as np

from megatransformer_jax.data.sources.record import BadRecord, decoded, open_file

MINIMUM_BYTES = 16 * 1024
MAXIMUM_BYTES = 64 * 1024
CUTS = (re.compile(rb"\r?\n[ \t]*\r?\n"), re.compile(rb"\n"), re.compile(rb" "))


class TextFile:
    """A text file as documents; together they are the file, byte for byte.

    A file of up to 16 KiB is one document. A longer one is cut at the first blank line after
    every 16 KiB, so that it can be shuffled, held out and tokenised piece by piece. Where 48 KiB
    pass without a blank line, the cut is at the first line end there, else at a blank, else
    between two characters.
    """

    def __init__(self, path: str):
        self._path = path
        self._bounds = _document_bounds(path)

    def __len__(self) -> int:
        return len(self._bounds) - 1

    def __getitem__(self, index: int) -> str | BadRecord:
        start, end = (int(bound) for bound in self._bounds[index : index + 2])
        with open_file(self._path) as file:
            file.seek(start)
            raw = file.read(end - start)
        return decoded(raw, f"{self._path}, bytes {start} to {end}")


def _document_bounds(path: str) -> np.ndarray:
    """Byte offsets at which documents start, and the end of the file."""
    bounds = [0]
    with open_file(path) as file:
        size = file.seek(0, 2)
        if size > MINIMUM_BYTES:
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                while size - bounds[-1] > MINIMUM_BYTES:
                    bounds.append(_next_cut(content, bounds[-1], size))
    if bounds[-1] != size:
        bounds.append(size)
    return np.array(bounds, np.int64)


def _next_cut(content: mmap.mmap, start: int, size: int) -> int:
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
