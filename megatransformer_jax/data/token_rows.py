"""Rows that `megatransformer prepare` has tokenised and packed: their files, and batches of them.

A folder holds the files below. A process that trains opens only the rows of its share of a batch.

| file | holds |
|---|---|
| `rows-00003-of-00064.array_record` | a shard of the rows of the training split, one per record |
| `validation-00000-of-00004.array_record` | the same of the validation split |
| `tokenizer.model`, `tokenizer.json` or `tokenizer/` | what made the tokens; not there for bytes |
| `tokens.json` | how all of it was made, and what each shard holds; written last |
"""

import dataclasses
import functools
import hashlib
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import grain
import numpy as np

from megatransformer_jax.config.data import DataConfig
from megatransformer_jax.config.option import ConfigError, UserError
from megatransformer_jax.data.batches import NumberedBatches, NumberedStream, Share
from megatransformer_jax.data.documents import in_order
from megatransformer_jax.data.packing import Row, SpecialIds
from megatransformer_jax.data.sources.record import unreadable
from megatransformer_jax.data.tokenizer import Tokenizer
from megatransformer_jax.storage import local_path
from megatransformer_jax.streams import Purpose, generator_of
from megatransformer_jax.types import Batch

TOKENS_FILE = "tokens.json"
# Another number where rows are written in another way.
FORMAT = 1
SPLITS = ("train", "validation")
_FILE_NAMES = {"train": "rows", "validation": "validation"}
# More ids than that take four bytes each.
_TWO_BYTES = 1 << 16
_COUNT_BYTES = 4

# ------------------------------------------------------------------------------
# One row as bytes.


@dataclasses.dataclass(frozen=True)
class RowCodec:
    """From a row to a record and back. Pickles.

    Inside a segment each target is the token that is read next. So a record holds the tokens that
    are read, the last target, and where segments end: the number of segments, their ends (both
    uint32), then the ids (uint16 if the vocabulary fits, otherwise int32), all little-endian.

    Attributes:
      length: of every row.
      vocab_size: of the tokenizer.
      ids: what packing has added.
    """

    length: int
    vocab_size: int
    ids: SpecialIds

    @classmethod
    def of(cls, config: DataConfig, tokenizer: Tokenizer) -> "RowCodec":
        """Of the rows that a configuration describes."""
        ids = SpecialIds(tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id)
        return cls(config.sequence_length, tokenizer.vocab_size, ids)

    def empty_batch(self, size: int) -> Batch:
        """Rows of padding, to write rows into."""
        shape = (size, self.length)
        return Batch(
            tokens=np.full(shape, self.ids.pad, np.int32),
            targets=np.full(shape, self.ids.pad, np.int32),
            loss_mask=np.zeros(shape, np.float32),
            segment_ids=np.zeros(shape, np.int32),
            positions=np.zeros(shape, np.int32),
        )

    @functools.cached_property
    def _id_type(self) -> np.dtype:
        return np.dtype("<u2" if self.vocab_size <= _TWO_BYTES else "<i4")

    @functools.cached_property
    def _places(self) -> np.ndarray:
        return np.arange(self.length + 1, dtype=np.int32)

    def encode(self, row: Row) -> bytes:
        """A row whose tokens are all shown and of which at least one position is not padding."""
        filled = int(np.count_nonzero(row.segment_ids))
        ends = np.flatnonzero(np.diff(row.segment_ids[:filled], append=0)) + 1
        ids = np.append(row.tokens[:filled], row.targets[filled - 1])
        head = np.array([len(ends), *ends], "<u4")
        return head.tobytes() + ids.astype(self._id_type).tobytes()

    def decode(self, record: bytes, batch: Batch, place: int) -> None:
        """Writes the row of a record into a batch, in place of a row of padding.

        Raises:
          ValueError: if it is not one of this format.
        """
        count = int.from_bytes(record[:_COUNT_BYTES], "little")
        ends = np.frombuffer(record, "<u4", count, _COUNT_BYTES)
        ids = np.frombuffer(record, self._id_type, offset=_COUNT_BYTES * (count + 1))
        filled = len(ids) - 1
        if not (count and ends[-1] == filled <= self.length):
            raise ValueError("it is not a row of this length and vocabulary")
        batch.tokens[place, :filled] = ids[:-1]
        batch.targets[place, :filled] = ids[1:]
        batch.loss_mask[place, :filled] = 1
        segment_ids, positions = batch.segment_ids[place], batch.positions[place]
        start = 0
        for segment, end in enumerate(ends.tolist(), 1):
            segment_ids[start:end] = segment
            positions[start:end] = self._places[: end - start]
            if end < filled:
                batch.targets[place, end - 1] = self.ids.eos
            start = end


# ------------------------------------------------------------------------------
# A folder of shards, described by tokens.json.


@dataclasses.dataclass(frozen=True)
class Shard:
    """What is known of a file of rows. ArrayRecord's readers take it in place of a name.

    Attributes:
      filename: path of the file.
      take: its rows; all of them are read.
    """

    filename: str
    take: int
    skip: int = 0

    @property
    def examples_in_shard(self) -> int:
        """All rows of the file."""
        return self.take


def shard_name(split: str, number: int, count: int) -> str:
    """The file of shard `number` of `count`."""
    return f"{_FILE_NAMES[split]}-{number:05d}-of-{count:05d}.array_record"


@dataclasses.dataclass(frozen=True)
class PreparedFolder:
    """A folder that was written whole.

    Attributes:
      path: of the folder.
      facts: the content of tokens.json: options by path, and of each split a list of its shards.
    """

    path: pathlib.Path
    facts: Mapping[str, Any]

    @property
    def tokenizer_kind(self) -> str:
        """`data.tokenizer.kind` of what made the tokens."""
        return self.facts["data.tokenizer.kind"]

    @property
    def fingerprint(self) -> str:
        """Hash of all rows and of how they were made; the same wherever the folder is."""
        text = json.dumps(self.facts, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def num_rows(self, split: str) -> int:
        """Rows of a split."""
        return sum(shard["rows"] for shard in self.facts[split])

    def shards(self, split: str) -> list[Shard]:
        """The files of a split that hold rows.

        Raises:
          UserError: if one is not there, or not whole.
        """
        facts = self.facts[split]
        shards = []
        for number, shard in enumerate(facts):
            path = self.path / shard_name(split, number, len(facts))
            _check_size(path, shard["bytes"])
            if shard["rows"]:
                shards.append(Shard(str(path), shard["rows"]))
        return shards

    def check(self, config: DataConfig, tokenizer: Tokenizer) -> None:
        """Checks that the rows are those of a run.

        Raises:
          ConfigError: naming the option that they were made with otherwise.
          UserError: if they were made by another tokenizer.
        """
        for name, value in (
            ("sequence_length", config.sequence_length),
            ("packing", config.packing),
        ):
            prepared = self.facts[f"data.{name}"]
            if value != prepared:
                raise ConfigError(
                    f"data.{name}",
                    f"{value!r}, but the rows in {self.path} were made with {prepared!r}; set it "
                    f"to {prepared!r}, or run `megatransformer prepare` with {value!r}.",
                )
        if self.facts["tokenizer"] != tokenizer.digest():
            raise UserError(
                f"{self.path}: its tokens were made by another tokenizer than that of this run "
                f"(digest {self.facts['tokenizer'][:12]}, not {tokenizer.digest()[:12]}), so its "
                "numbers mean other pieces. Prepare the data again with this run's configuration, "
                "or use the tokenizer in that folder (data.tokenizer as it was there, and a "
                "workdir without another)."
            )


def _check_size(path: pathlib.Path, size: int) -> None:
    try:
        found = path.stat().st_size
    except FileNotFoundError:
        found = None
    except OSError as error:
        raise unreadable(str(path), error) from error
    if found != size:
        what = "does not exist" if found is None else f"has {found} bytes in place of {size}"
        raise UserError(
            f"{path} {what}, so {path.parent} is not whole. Copy the file again, or delete it and "
            "run the `megatransformer prepare` that wrote it."
        )


def read_prepared(name: str) -> PreparedFolder:
    """The folder that `data.files` names.

    Raises:
      ConfigError: if `megatransformer prepare` has not finished one there.
      UserError: if tokens.json cannot be read or is of another version.
    """
    path = local_path("data.files", name)
    file = path / TOKENS_FILE
    try:
        facts = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ConfigError(
            "data.files",
            f"{name!r} has no {TOKENS_FILE}, so it is not a folder that `megatransformer prepare` "
            "has finished; name one that is, or start the command again: it goes on where it "
            "stopped.",
        ) from error
    except OSError as error:
        raise unreadable(str(file), error) from error
    except ValueError as error:
        raise UserError(
            f"{file} is not JSON ({error}). Copy it again, or delete it and run the "
            "`megatransformer prepare` that wrote it."
        ) from error
    if not isinstance(facts, dict) or facts.get("format") != FORMAT:
        version = facts.get("format") if isinstance(facts, dict) else None
        raise UserError(
            f"{file}: the rows are of format {version!r}, and this version of the library reads "
            f"{FORMAT}. Prepare the data again."
        )
    return PreparedFolder(path, facts)


def prepared_fingerprint(names: Sequence[str]) -> str:
    """The rows of folders, in words for a message; the same wherever the folders are.

    Raises:
      UserError: if one cannot be read.
    """
    words = []
    for folder in map(read_prepared, names):
        counts = " + ".join(str(folder.num_rows(split)) for split in SPLITS)
        words.append(f"{counts} rows, sha256 {folder.fingerprint}")
    return "prepared: " + ", ".join(words)


# ------------------------------------------------------------------------------
# Batches.


class TokenRecords:
    """Records of a split of several folders, by number. Pickles, for worker processes.

    Files are opened when a row of theirs is read first, and records are read one by one.

    Raises:
      UserError: if a file is missing, or there are no rows.
    """

    def __init__(self, folders: Sequence[PreparedFolder], split: str):
        shards = [shard for folder in folders for shard in folder.shards(split)]
        if not shards:
            paths = ", ".join(str(folder.path) for folder in folders)
            raise UserError(f"{paths}: the {split} split has no rows. Name a folder that has some.")
        self._records = grain.sources.ArrayRecordDataSource(shards)
        self._ends = np.cumsum([shard.take for shard in shards])
        self._shards = shards

    def read(self, number: int, codec: RowCodec, batch: Batch, place: int) -> None:
        """Writes a row into a batch; see `RowCodec.decode`.

        Raises:
          UserError: if its record cannot be read.
        """
        try:
            codec.decode(self._records[number], batch, place)
        except (RuntimeError, ValueError, OSError) as error:
            shard = self._shards[int(np.searchsorted(self._ends, number, side="right"))]
            raise UserError(
                f"{shard.filename}: a row cannot be read ({error}). Copy the file again, or delete "
                "it and run the `megatransformer prepare` that wrote it."
            ) from error


class TokenBatches(NumberedStream[Batch]):
    """Batches of prepared rows. Each process reads its own share only.

    A global batch is the next `batch_size` rows of one order, whatever the number of processes:
    each takes a block of them. Training visits all rows in a new order each epoch, or mixes the
    folders by `data.mixture`, each with epochs of its own; validation is one pass over the rows of
    all folders, evenly interleaved. The state is the number of the next batch.

    Args:
      config: with source='tokens'.
      tokenizer: of the run.
      split: 'train' or 'validation'.
      share: which rows of each batch are read.

    Raises:
      UserError: if a folder cannot be used or does not go with the configuration.
    """

    def __init__(self, config: DataConfig, tokenizer: Tokenizer, split: str, share: Share):
        folders = [read_prepared(name) for name in config.files]
        for folder in folders:
            folder.check(config, tokenizer)
        codec = RowCodec.of(config, tokenizer)
        sizes = [folder.num_rows(split) for folder in folders]
        is_training = split == "train"
        order = training_order(config, sizes) if is_training else validation_order(sizes)
        make = functools.partial(
            _batch_of_rows,
            TokenRecords(folders, split),
            order,
            codec,
            TokenHiding(config.augmentation.token_dropout if is_training else 0, config.seed),
        )
        super().__init__(NumberedBatches(len(order), share, make), config.num_workers)


def training_order(config: DataConfig, sizes: Sequence[int]) -> grain.MapDataset:
    """Numbers of rows without end; those of a folder come after those of the folders before it.

    Args:
      config: whose `mixture` and `seed` decide.
      sizes: rows of each folder.

    Raises:
      ConfigError: if a folder without rows is to be mixed in.
    """
    ends = np.cumsum(sizes)
    options: dict[str, Any] = {"seed": config.seed, "shuffle": config.shuffle, "repeat": True}
    if not config.mixture:
        return in_order(grain.MapDataset.range(int(ends[-1])), **options)
    if 0 in sizes:
        name = config.files[list(sizes).index(0)]
        raise ConfigError("data.files", f"{name!r} has no rows to mix in; leave it out.")
    parts = [
        in_order(grain.MapDataset.range(int(end) - size, int(end)), **options)
        for size, end in zip(sizes, ends, strict=True)
    ]
    return grain.MapDataset.mix(parts, config.mixture)


def validation_order(sizes: Sequence[int]) -> grain.MapDataset:
    """Numbers of all rows, each once, so that the first ones stand for every folder."""
    places = np.concatenate([(np.arange(size) + 0.5) / max(size, 1) for size in sizes])
    return grain.MapDataset.source(np.argsort(places, kind="stable"))


@dataclasses.dataclass(frozen=True)
class TokenHiding:
    """Hides tokens where they are read, but not where they are predicted; never a start token.

    Attributes:
      rate: probability of each token.
      seed: `data.seed`.
    """

    rate: float
    seed: int

    def apply(self, tokens: np.ndarray, number: int, ids: SpecialIds) -> None:
        """Hides in a row, [T]; `number` is its own in the stream of all epochs."""
        if self.rate:
            draws = generator_of(self.seed, number, Purpose.TOKEN_DROPOUT).random(len(tokens))
            tokens[(draws < self.rate) & (tokens != ids.bos)] = ids.pad


def _batch_of_rows(
    records: TokenRecords,
    order: grain.MapDataset,
    codec: RowCodec,
    hiding: TokenHiding,
    numbers: list[int],
    size: int,
) -> Batch:
    batch = codec.empty_batch(size)
    for place, number in enumerate(numbers):
        records.read(int(order[number]), codec, batch, place)
        hiding.apply(batch.tokens[place], number, codec.ids)
    return batch
