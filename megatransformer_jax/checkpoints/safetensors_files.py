"""Folders of safetensors files, in one file or in shards with an index.

Reading is tensor by tensor and writing shard by shard, so that a model need not be in memory as a
whole. The layout is Hugging Face's: `model.safetensors`, or `model-00001-of-00003.safetensors` and
so on next to `model.safetensors.index.json`, which says what is where.
"""

import os
import pathlib
from collections.abc import Iterable, Iterator, Mapping

import ml_dtypes  # noqa: F401  (NumPy then knows bfloat16)
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from megatransformer_jax.config.build import read_values
from megatransformer_jax.config.option import UserError
from megatransformer_jax.storage import make_readable, write_json

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
SHARD_FILE = "model-{number:05d}-of-{count:05d}.safetensors"

# Names that weights have if they are pickles of PyTorch.
PICKLES = ("pytorch_model.bin", "model.pt")

# Readers of PyTorch weights refuse a file that does not say so.
_METADATA = {"format": "pt"}
_LFS_POINTER = b"version https://git-lfs"
_SHOWN = 8


class WeightsFileError(UserError):
    """A weights file is missing or damaged, or contradicts its index. Names file and fix."""


class SafetensorsReader(Mapping[str, np.ndarray]):
    """The tensors of a folder; each is read from disk whenever it is asked for.

    No file stays open between reads, since what was read of a mapped file counts as memory of the
    process for as long as it is.

    Args:
      folder: has `model.safetensors`, or `model.safetensors.index.json` and what it names.

    Raises:
      WeightsFileError: if a file is missing, damaged or cut off, if the index names tensors that
        its files lack, or the files hold tensors twice or that the index does not name.
    """

    def __init__(self, folder: str | os.PathLike[str]):
        self._folder = pathlib.Path(folder)
        self._places = _locate(self._folder)
        # Shapes and types of what each file holds.
        self._described = {
            file: _describe(self._folder / file) for file in sorted(set(self._places.values()))
        }
        self._check_index()

    def _check_index(self) -> None:
        found: dict[str, list[str]] = {}
        for file, described in self._described.items():
            for name in described:
                found.setdefault(name, []).append(file)
        absent = [n for n, file in self._places.items() if file not in found.get(n, [])]
        twice = [f"{n} ({' and '.join(files)})" for n, files in found.items() if len(files) > 1]
        unnamed = [f"{n} ({files[0]})" for n, files in found.items() if n not in self._places]
        for problem, names in (
            ("tensors that their files do not hold", [f"{n} ({self._places[n]})" for n in absent]),
            ("tensors that two files hold", twice),
            ("tensors in the files that it does not name", unnamed),
        ):
            if names:
                raise WeightsFileError(
                    f"{self._folder / INDEX_FILE}: {problem}: {shortened(names)}. The index and "
                    "the files are not of one save; get all of them from the same source again."
                )

    def __getitem__(self, name: str) -> np.ndarray:
        """Reads a tensor, in the type in which it is stored."""
        path = self._folder / self._places[name]
        try:
            with safe_open(path, framework="np") as file:
                return file.get_tensor(name)
        except (SafetensorError, OSError, TypeError, AttributeError) as error:
            raise WeightsFileError(
                f"{path}: tensor {name!r} cannot be read ({error}); get the file again."
            ) from error

    def __contains__(self, name: object) -> bool:
        return name in self._places  # Mapping's own would read the tensor.

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, without reading it."""
        return self._described[self._places[name]][name][0]

    def type_name(self, name: str) -> str:
        """The type of a tensor in the format's own words ('F32', 'BF16'), without reading it."""
        return self._described[self._places[name]][name][1]


def write_safetensors(
    folder: str | os.PathLike[str],
    tensors: Iterable[tuple[str, np.ndarray]],
    max_shard_bytes: int,
) -> int:
    """Writes tensors into an existing folder.

    Args:
      folder: where to.
      tensors: names and values in the order in which they are to be stored. Taken one by one; at
        most a shard of them is held at a time.
      max_shard_bytes: a shard is closed before a tensor that would make it larger. A tensor that
        is larger by itself has a shard of its own.

    Returns:
      Bytes of all tensors.
    """
    folder = pathlib.Path(folder)
    shards: list[list[str]] = []
    total = 0
    for number, shard in enumerate(_shards(tensors, max_shard_bytes), 1):
        save_file(shard, _unfinished(folder, number), metadata=_METADATA)
        make_readable(_unfinished(folder, number))
        shards.append(list(shard))
        total += sum(tensor.nbytes for tensor in shard.values())
    if len(shards) == 1:
        _unfinished(folder, 1).rename(folder / SINGLE_FILE)
        return total
    places: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        file = SHARD_FILE.format(number=number, count=len(shards))
        _unfinished(folder, number).rename(folder / file)
        places |= dict.fromkeys(names, file)
    write_json(folder / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": places})
    return total


def shortened(names: Iterable[str]) -> str:
    """The first names, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def _shards(
    tensors: Iterable[tuple[str, np.ndarray]], max_bytes: int
) -> Iterator[dict[str, np.ndarray]]:
    shard: dict[str, np.ndarray] = {}
    size = 0
    for name, tensor in tensors:
        if shard and size + tensor.nbytes > max_bytes:
            yield shard
            shard, size = {}, 0
        # The library writes the memory as it lies.
        shard[name] = np.ascontiguousarray(tensor)
        size += tensor.nbytes
    yield shard


def _unfinished(folder: pathlib.Path, number: int) -> pathlib.Path:
    """A shard's file as long as the number of shards, which is in its name, is unknown."""
    return folder / f"shard-{number:05d}.unfinished"


def _locate(folder: pathlib.Path) -> dict[str, str]:
    """The file of every tensor."""
    single, index = folder / SINGLE_FILE, folder / INDEX_FILE
    if single.is_file() and index.is_file():
        raise WeightsFileError(
            f"{folder} has both {SINGLE_FILE} and {INDEX_FILE}, so which weights are meant is "
            "unknown; delete the ones that are out of date."
        )
    if single.is_file():
        return dict.fromkeys(_describe(single), SINGLE_FILE)
    if not index.is_file():
        pickles = [name for name in PICKLES if (folder / name).is_file()]
        if pickles:
            raise WeightsFileError(
                f"{folder} has its weights as a pickle only ({pickles[0]}), which can run code "
                "when it is read. Convert it where you trust it: transformers writes safetensors, "
                "AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER)."
            )
        raise WeightsFileError(
            f"{single} does not exist, nor does {INDEX_FILE} next to it; name a folder that has "
            "the weights as safetensors."
        )
    return _read_index(index)


def _read_index(path: pathlib.Path) -> dict[str, str]:
    places = read_values(path).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise WeightsFileError(
            f"{path}: has no 'weight_map' from tensors to files, so it is not an index; get it "
            "again."
        )
    for name, file in places.items():
        # Never out of the folder.
        if not isinstance(file, str) or pathlib.PurePath(file).name != file:
            raise WeightsFileError(
                f"{path}: places tensor {name!r} in {file!r}, which is not the name of a file "
                "next to it; get the index again."
            )
    absent = sorted({file for file in places.values() if not (path.parent / file).is_file()})
    if absent:
        raise WeightsFileError(
            f"{path}: names files that are not there: {shortened(absent)}; put them next to it."
        )
    return places


def _describe(path: pathlib.Path) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and type, in the format's own words, of every tensor of a file."""
    try:
        with safe_open(path, framework="np") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            return {
                name: (tuple(part.get_shape()), part.get_dtype()) for name, part in slices.items()
            }
    except PermissionError as error:
        raise WeightsFileError(f"{path}: must not be read; change its permissions.") from error
    except (SafetensorError, OSError) as error:
        with path.open("rb") as file:
            is_pointer = file.read(len(_LFS_POINTER)) == _LFS_POINTER
        if is_pointer:
            raise WeightsFileError(
                f"{path}: is a Git LFS pointer and not the weights; run 'git lfs pull' there."
            ) from error
        raise WeightsFileError(
            f"{path}: is damaged or cut off, {path.stat().st_size:,} bytes ({error}); get the file "
            "again."
        ) from error
