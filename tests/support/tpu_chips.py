"""Described chips of TPU slices, in place of devices."""

import dataclasses
import itertools


@dataclasses.dataclass(frozen=True)
class Chip:
    """What JAX tells of one device."""

    id: int
    coords: tuple[int, int, int]
    slice_index: int = 0
    core_on_chip: int = 0
    device_kind: str = "TPU v4"
    platform: str = "tpu"
    process_index: int = 0


def torus(x: int, y: int, z: int, slice_index: int = 0, cores: int = 1) -> list[Chip]:
    places = itertools.product(range(z), range(y), range(x), range(cores))
    return [
        Chip(slice_index * x * y * z * cores + number, (a, b, c), slice_index, core)
        for number, (c, b, a, core) in enumerate(places)
    ]
