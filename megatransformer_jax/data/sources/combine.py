"""Sources made of sources."""

import typing

import numpy as np

from megatransformer_jax.config.option import ConfigError
from megatransformer_jax.data.sources.record import BadRecord, TextSource

# Philox stream of the held-out draw; orders and problems use other streams of the same seed.
SPLIT_STREAM = 1 << 62


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
    rng = np.random.Generator(np.random.Philox(key=np.array([seed, SPLIT_STREAM], np.uint64)))
    order = rng.permutation(size)
    return Subset(source, np.sort(order[held_out:])), Subset(source, np.sort(order[:held_out]))
