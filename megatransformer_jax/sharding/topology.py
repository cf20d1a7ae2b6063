"""Slices of TPUs by name, and their devices as libtpu describes them on a machine without a TPU.

A name is that of an accelerator, as clouds sell it (v4-128, v5e-16), or a kind with the extents of
its box of chips (v4:4x4x4, v5e:4x4). The number behind v4 and v5p counts cores, of which a chip has
two; behind v5e and v6e it counts chips.
"""

import contextlib
import dataclasses
import math
import os
import pathlib
import re
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from megatransformer_jax.config.option import ConfigError, UserError, nearest_hint
from megatransformer_jax.extras import import_extra

# Boxes of accelerators by their number of chips. Clouds sell other boxes, too; `kind:AxBxC` names
# any of them.
_BOXES_3D = (
    (2, 2, 1),
    (2, 2, 2),
    (2, 2, 4),
    (2, 4, 4),
    (4, 4, 4),
    (4, 4, 8),
    (4, 8, 8),
    (8, 8, 8),
    (8, 8, 16),
    (8, 16, 16),
)
_BOXES_2D = ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))
# Describing more takes minutes and gigabytes.
MAX_CHIPS = 65_536
# Sides of the box of chips that share a host, where the slice is not smaller.
_HOST_SIDE = 2
# Files by which a machine with TPUs offers them.
_TPU_FILES = ("/dev/accel0", "/dev/vfio/0")
# What libtpu is told before it describes a slice; otherwise it looks for a TPU and complains that
# there is none. Several processes may describe and compile at the same time.
QUIET_ENVIRONMENT: Mapping[str, str] = MappingProxyType(
    {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": "v4-8",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }
)


@dataclasses.dataclass(frozen=True)
class SliceKind:
    """A generation of TPUs.

    Attributes:
      name: as in `DEVICE_KINDS`.
      boxes: of the accelerators that a number names.
      cores_per_chip: what the number counts.
      configuration: of libtpu, with which a chip is one device.
    """

    name: str
    boxes: tuple[tuple[int, ...], ...]
    cores_per_chip: int
    configuration: str

    def accelerators(self) -> dict[str, tuple[int, ...]]:
        """Their boxes, by name."""
        return {f"{self.name}-{math.prod(box) * self.cores_per_chip}": box for box in self.boxes}


SLICE_KINDS = {
    kind.name: kind
    for kind in (
        SliceKind("v4", _BOXES_3D, 2, "megacore"),
        SliceKind("v5p", _BOXES_3D, 2, "default"),
        SliceKind("v5e", _BOXES_2D, 1, "default"),
        SliceKind("v6e", _BOXES_2D, 1, "default"),
    )
}
# Google's longer names.
_OTHER_NAMES = {"v5litepod": "v5e"}


@dataclasses.dataclass(frozen=True)
class Topology:
    """One or more equal slices.

    Attributes:
      kind: of the chips, one of `SLICE_KINDS`.
      box: extents of a slice in chips.
      slices: how many are joined by the data centre's network.
    """

    kind: str
    box: tuple[int, ...]
    slices: int = 1

    @property
    def chips(self) -> int:
        """Of all slices."""
        return math.prod(self.box) * self.slices

    def __str__(self) -> str:
        """As in 'v4:4x4x4' or '2 x v5e:16x16'."""
        name = f"{self.kind}:{'x'.join(map(str, self.box))}"
        return name if self.slices == 1 else f"{self.slices} x {name}"


def parse_topology(name: str, slices: int = 1) -> Topology:
    """The slices of a name.

    Args:
      name: such as v4-128, v4:4x4x4, v5e-16, v5litepod-16 or v6e:4x4.
      slices: how many of them.

    Raises:
      ConfigError: of the option `topology` or `slices`, if such slices do not exist.

    Examples:
      >>> str(parse_topology("v4-128")), parse_topology("v4-128").chips
      ('v4:4x4x4', 64)
      >>> str(parse_topology("v5e:4x8", slices=2))
      '2 x v5e:4x8'
    """
    if slices < 1:
        raise ConfigError("slices", f"{slices} slices; at least one is needed.")
    match = re.fullmatch(r"([a-z0-9]+)(?:-(\d{1,6})|:(\d{1,3}(?:x\d{1,3})+))", name.strip().lower())
    if match is None:
        raise ConfigError(
            "topology",
            f"{name!r} is not the name of a slice; write it as v4-128, or as v4:4x4x4 with the "
            f"extents of its box of chips. Kinds: {', '.join(SLICE_KINDS)}.",
        )
    written, number, extents = match.groups()
    kind = SLICE_KINDS.get(_OTHER_NAMES.get(written, written))
    if kind is None:
        raise ConfigError(
            "topology",
            f"{name!r}: {written!r} is not a kind of TPU that is known; "
            f"{nearest_hint(written, SLICE_KINDS)}known: {', '.join(SLICE_KINDS)}.",
        )
    if number is None:
        box = tuple(map(int, extents.split("x")))
        _check_box(name, kind, box)
        return _checked_size(Topology(kind.name, box, slices))
    found = kind.accelerators()
    asked = f"{kind.name}-{int(number)}"
    if asked not in found:
        unit = "chips" if kind.cores_per_chip == 1 else f"cores, {kind.cores_per_chip} per chip"
        example = "x".join(map(str, kind.boxes[3]))
        raise ConfigError(
            "topology",
            f"{name!r}: there is no such accelerator; known: {', '.join(found)} (the number "
            f"counts {unit}). Or give the box of chips, as {kind.name}:{example}.",
        )
    return _checked_size(Topology(kind.name, found[asked], slices))


def _checked_size(topology: Topology) -> Topology:
    if topology.chips > MAX_CHIPS:
        raise ConfigError(
            "topology" if topology.slices == 1 else "slices",
            f"{topology} has {topology.chips} chips; at most {MAX_CHIPS} are described.",
        )
    return topology


def _check_box(name: str, kind: SliceKind, box: tuple[int, ...]) -> None:
    dimensions = len(kind.boxes[0])
    if len(box) != dimensions or 0 in box:
        example = "x".join(map(str, kind.boxes[3]))
        raise ConfigError(
            "topology",
            f"{name!r}: the chips of {kind.name} form a box of {dimensions} dimensions; write it "
            f"as {kind.name}:{example}.",
        )
    if box in kind.boxes:
        return
    if any(side % _HOST_SIDE for side in box[:2]):
        raise ConfigError(
            "topology",
            f"{name!r}: each host has {_HOST_SIDE}x{_HOST_SIDE} chips, so the first two sides are "
            f"even, or the box is one of {', '.join('x'.join(map(str, b)) for b in kind.boxes)}.",
        )


def describe_devices(topology: Topology) -> Sequence[Any]:
    """The devices of slices that need not be here; a chip is one device.

    libtpu describes them, and programs may be compiled for them.

    Raises:
      UserError: if libtpu is missing or cannot be used in this process.
      ConfigError: of the option `topology`, if libtpu knows no such slice.
    """
    import_extra("libtpu", "tpu", "programs for TPUs")
    from jax.experimental import topologies  # noqa: PLC0415

    kind, options = SLICE_KINDS[topology.kind], {}
    if topology.slices > 1:
        options["num_slices"] = topology.slices
    sides = tuple(min(side, _HOST_SIDE) for side in topology.box[:2])
    extents = "x".join(map(str, topology.box))
    with _quiet_libtpu(), _libtpu_errors(topology):
        devices: Sequence[Any] = topologies.get_topology_desc(
            f"{topology.kind}:{extents}",
            "tpu",
            chip_config_name=kind.configuration,
            chips_per_host_bounds=[*sides, 1],
            **options,
        ).devices
    return devices


@contextlib.contextmanager
def _quiet_libtpu() -> Iterator[None]:
    """Sets what keeps libtpu from looking for a TPU while it is loaded, on a machine without one.

    It reads these variables once, so they are removed again.
    """
    missing = [name for name in QUIET_ENVIRONMENT if name not in os.environ]
    # It is of no use to a JAX that has been imported.
    missing = [name for name in missing if name != "JAX_PLATFORMS"]
    if any(pathlib.Path(file).exists() for file in _TPU_FILES):
        missing = []
    os.environ.update({name: QUIET_ENVIRONMENT[name] for name in missing})
    try:
        yield
    finally:
        for name in missing:
            os.environ.pop(name, None)


@contextlib.contextmanager
def _libtpu_errors(topology: Topology) -> Iterator[None]:
    """What libtpu raises, in words that name the fix."""
    from jax.errors import JaxRuntimeError  # noqa: PLC0415

    try:
        yield
    except JaxRuntimeError as error:
        text = str(error).strip()
        if "lockfile" in text or text.startswith("ABORTED"):
            raise UserError(
                f"{topology}: another process uses libtpu; set ALLOW_MULTIPLE_LIBTPU_LOAD=1 "
                "before Python starts, as `megatransformer compile` does, or end that process."
            ) from error
        if text.startswith("INVALID_ARGUMENT"):
            raise ConfigError("topology", f"libtpu knows no slices {topology}: {text}") from error
        raise UserError(
            f"{topology}: libtpu cannot be used in this process ({text}). Start Python with "
            f"{' '.join(f'{name}={value}' for name, value in QUIET_ENVIRONMENT.items())}, or use "
            "`megatransformer compile`, which does."
        ) from error
