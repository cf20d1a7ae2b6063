"""Slices of TPUs and machines of GPUs by name, and their devices, which need not be here.

The name of a slice is that of an accelerator, as clouds sell it (v4-128, v5e-16), or a kind with
the extents of its box of chips (v4:4x4x4, v5e:4x4). The number behind v4 and v5p counts cores, of
which a chip has two; behind v5e and v6e it counts chips. libtpu describes their devices on a
machine without a TPU.

h100-8 is a machine with eight GPUs. JAX's CUDA plugin makes devices of a description of the GPU.
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
from megatransformer_jax.sharding.devices import device_kind

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

# ------------------------------------------------------------------------------
# GPUs.

# Of one machine, joined by NVLink.
MAX_GPUS = 8


@dataclasses.dataclass(frozen=True)
class GpuKind:
    """A kind of GPUs.

    Attributes:
      name: as in `DEVICE_KINDS`.
      title: as JAX names its devices.
      capability: NVIDIA's compute capability, a key of `_CAPABILITIES`.
      multiprocessors: how many.
      clock_ghz: at most.
      l2_mib: cache that all multiprocessors share.
      bf16_flops: of dense matrix products, FLOP/s.
      memory_bandwidth: bytes/s.
      link_bandwidth: bytes/s that it sends to the others of its machine.
      network_bandwidth: bytes/s that it sends to other machines.
    """

    name: str
    title: str
    capability: tuple[int, int]
    multiprocessors: int
    clock_ghz: float
    l2_mib: int
    bf16_flops: float
    memory_bandwidth: float
    link_bandwidth: float
    network_bandwidth: float

    @property
    def memory_bytes(self) -> int:
        """Built in."""
        return int(device_kind(self.name).memory_gib * 2**30)


# NVIDIA's data sheets, of the variants with SXM modules; rates without sparsity. NVLink's rates are
# stated for both directions together, so half of them counts. The network is that of DGX and HGX
# machines, an adapter per GPU: 200 Gbit/s for A100, 400 for H100, H200 and B200. L4 has PCIe 4.0
# x16 in place of NVLink, and is rented with 100 Gbit/s for eight.
_GPUS = (
    ("l4", "NVIDIA L4", (8, 9), 58, 2.04, 48, 121e12, 0.3e12, 32e9, 1.6e9),
    ("a100-40gb", "NVIDIA A100-SXM4-40GB", (8, 0), 108, 1.41, 40, 312e12, 1.555e12, 300e9, 25e9),
    ("a100-80gb", "NVIDIA A100-SXM4-80GB", (8, 0), 108, 1.41, 40, 312e12, 2.039e12, 300e9, 25e9),
    ("h100", "NVIDIA H100 80GB HBM3", (9, 0), 132, 1.98, 50, 989.5e12, 3.35e12, 450e9, 50e9),
    ("h200", "NVIDIA H200", (9, 0), 132, 1.98, 50, 989.5e12, 4.8e12, 450e9, 50e9),
    ("b200", "NVIDIA B200", (10, 0), 148, 1.965, 126, 2250e12, 8e12, 900e9, 50e9),
)
GPU_KINDS = {kind.name: kind for kind in (GpuKind(*numbers) for numbers in _GPUS)}
# By compute capability, of a multiprocessor: threads, FP32 units, KiB of shared memory. A block can
# use 1 KiB less of that. CUDA C++ programming guide, "Compute capabilities".
_CAPABILITIES = {
    (8, 0): (2048, 64, 164),
    (8, 9): (1536, 128, 100),
    (9, 0): (2048, 128, 228),
    (10, 0): (2048, 128, 228),
}
# What all of them have in common, by the names of XLA's GpuTargetConfigProto.
_EVERY_GPU = {
    "threads_per_block_limit": 1024,
    "threads_per_warp": 32,
    "shared_memory_per_block": 48 * 1024,
    "registers_per_core_limit": 65_536,
    "registers_per_block_limit": 65_536,
    "block_dim_limit_x": 2**31 - 1,
    "block_dim_limit_y": 65_535,
    "block_dim_limit_z": 65_535,
    "thread_dim_limit_x": 1024,
    "thread_dim_limit_y": 1024,
    "thread_dim_limit_z": 64,
}
# Versions that the compiler is told; tried with the plugins for CUDA 12 and 13.
_CUDA_VERSION, _CUDNN_VERSION = (12, 9, 0), (9, 10, 0)


def gpu_description(kind: GpuKind) -> str:
    """A GPU as XLA's compiler wants it described: GpuTargetConfigProto, as text."""
    threads, units, shared_kib = _CAPABILITIES[kind.capability]
    values = _EVERY_GPU | {
        "threads_per_core_limit": threads,
        "fpus_per_core": units,
        "shared_memory_per_core": shared_kib * 1024,
        "shared_memory_per_block_optin": (shared_kib - 1) * 1024,
        "core_count": kind.multiprocessors,
        "clock_rate_ghz": kind.clock_ghz,
        "l2_cache_size": kind.l2_mib * 2**20,
        "memory_bandwidth": int(kind.memory_bandwidth),
        "device_memory_size": kind.memory_bytes,
    }
    lines = [f"{name}: {value}" for name, value in values.items()]
    major, minor = kind.capability
    lines.append(f"cuda_compute_capability {{ major: {major} minor: {minor} }}")
    for name, version in (
        ("runtime_version", _CUDA_VERSION),
        ("driver_version", _CUDA_VERSION),
        ("dnn_version", _CUDNN_VERSION),
    ):
        lines.append(f'{name}: "{".".join(map(str, version))}"')
    cudnn = " ".join(
        f"{part}: {number}"
        for part, number in zip(("major", "minor", "patch"), _CUDNN_VERSION, strict=True)
    )
    return (
        f"gpu_device_info {{ {' '.join(lines)} }} platform_name: 'CUDA' "
        f"dnn_version_info {{ {cudnn} }} device_description_str: '{kind.title}'"
    )


# ------------------------------------------------------------------------------
# Names.


@dataclasses.dataclass(frozen=True)
class Topology:
    """One or more equal slices, or machines with GPUs.

    Attributes:
      kind: of the chips, one of `SLICE_KINDS` or `GPU_KINDS`.
      box: extents of a slice in chips; of a machine, the number of its GPUs.
      slices: how many are joined by the data centre's network.
    """

    kind: str
    box: tuple[int, ...]
    slices: int = 1

    @property
    def chips(self) -> int:
        """Of all slices."""
        return math.prod(self.box) * self.slices

    @property
    def gpu(self) -> GpuKind | None:
        """What they are, if they are GPUs."""
        return GPU_KINDS.get(self.kind)

    def __str__(self) -> str:
        """As in 'v4:4x4x4', '2 x v5e:16x16' or 'h100-8'."""
        sign = ":" if self.gpu is None else "-"
        name = f"{self.kind}{sign}{'x'.join(map(str, self.box))}"
        return name if self.slices == 1 else f"{self.slices} x {name}"


_KINDS = ", ".join([*SLICE_KINDS, *GPU_KINDS])


def parse_topology(name: str, slices: int = 1) -> Topology:
    """The slices, or the machines, of a name.

    Args:
      name: such as v4-128, v4:4x4x4, v5e-16, v5litepod-16, v6e:4x4 or h100-8.
      slices: how many of them.

    Raises:
      ConfigError: of the option `topology` or `slices`, if such slices do not exist.

    Examples:
      >>> str(parse_topology("v4-128")), parse_topology("v4-128").chips
      ('v4:4x4x4', 64)
      >>> str(parse_topology("h100-8", slices=2)), parse_topology("h100-8", slices=2).chips
      ('2 x h100-8', 16)
      >>> str(parse_topology("v5e:4x8", slices=2))
      '2 x v5e:4x8'
    """
    if slices < 1:
        raise ConfigError("slices", f"{slices} slices; at least one is needed.")
    text = name.strip().lower()
    gpus = re.fullmatch(rf"({'|'.join(GPU_KINDS)})-(\d{{1,6}})", text)
    if gpus is not None:
        return _machines(name, gpus.group(1), int(gpus.group(2)), slices)
    _check_gpu_name(name, text)
    match = re.fullmatch(r"([a-z0-9]+)(?:-(\d{1,6})|:(\d{1,3}(?:x\d{1,3})+))", text)
    if match is None:
        raise ConfigError(
            "topology",
            f"{name!r} is not the name of a slice or a machine; write it as v4-128, or as v4:4x4x4 "
            f"with the extents of its box of chips, or as h100-8. Kinds: {_KINDS}.",
        )
    written, number, extents = match.groups()
    kind = SLICE_KINDS.get(_OTHER_NAMES.get(written, written))
    if kind is None:
        raise ConfigError(
            "topology",
            f"{name!r}: {written!r} is not a kind of TPU or GPU that is known; "
            f"{nearest_hint(written, SLICE_KINDS)}known: {_KINDS}.",
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


def _check_gpu_name(name: str, text: str) -> None:
    """Refuses names that begin as those of GPUs, and do not end so."""
    began = re.match(r"[a-z0-9]+(?:-\d+gb)?", text)
    start = began.group() if began else ""
    kinds = [kind for kind in GPU_KINDS if kind == start or kind.startswith(f"{start}-")]
    if kinds:
        raise ConfigError(
            "topology",
            f"{name!r}: a machine is named by the kind of its GPUs and their number, 1 to "
            f"{MAX_GPUS}; write {' or '.join(f'{kind}-{MAX_GPUS}' for kind in kinds)}.",
        )


def _machines(name: str, kind: str, count: int, machines: int) -> Topology:
    if not 1 <= count <= MAX_GPUS:
        raise ConfigError(
            "topology",
            f"{name!r}: a machine has 1 to {MAX_GPUS} GPUs; for more write {kind}-{MAX_GPUS} and "
            "say with `slices` how many machines there are.",
        )
    return _checked_size(Topology(kind, (count,), machines))


def _checked_size(topology: Topology) -> Topology:
    if topology.chips > MAX_CHIPS:
        raise ConfigError(
            "topology" if topology.slices == 1 else "slices",
            f"{topology} has {topology.chips} chips; at most {MAX_CHIPS} are described, so name "
            "fewer.",
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


# ------------------------------------------------------------------------------
# Devices.


def describe_devices(topology: Topology) -> Sequence[Any]:
    """The devices of slices or machines that need not be here; a chip is one device.

    libtpu or JAX's CUDA plugin describes them, and programs may be compiled for them.

    Raises:
      UserError: if libtpu or the plugin is missing or cannot be used in this process.
      ConfigError: of the option `topology`, if libtpu knows no such slice.
    """
    if topology.gpu is not None:
        return _described_gpus(topology, topology.gpu)
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


def _described_gpus(topology: Topology, kind: GpuKind) -> Sequence[Any]:
    from jax.errors import JaxRuntimeError  # noqa: PLC0415
    from jax.experimental import topologies  # noqa: PLC0415

    try:
        devices: Sequence[Any] = topologies.get_topology_desc(
            kind.name,
            "cuda",
            target_config=gpu_description(kind),
            # Partitions, machines, GPUs of a machine.
            topology=f"1x{topology.slices}x{topology.box[0]}",
        ).devices
    except NotImplementedError as error:
        raise UserError(
            f"{topology}: programs for GPUs are compiled by JAX's CUDA plugin, which is not "
            "installed or too old; install the extra 'cuda' (no GPU is needed): pip install "
            "'megatransformer_jax[cuda]', or pip install -e '.[cuda]' in a checkout."
        ) from error
    except JaxRuntimeError as error:
        raise UserError(
            f"{topology}: JAX's CUDA plugin cannot describe these GPUs ({error}); install the "
            "plugin of the same version as jax: pip install -U 'megatransformer_jax[cuda]'."
        ) from error
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
