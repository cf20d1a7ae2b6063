"""Builds the device mesh from the config and checks that devices, model and batch fit it."""

import dataclasses
import itertools
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from megatransformer_jax.config.loop import DataMeshConfig, MeshConfig, ModelMeshConfig
from megatransformer_jax.config.model import ModelConfig
from megatransformer_jax.config.option import ConfigError
from megatransformer_jax.config.run import RunConfig
from megatransformer_jax.config.run_rules import media_places
from megatransformer_jax.sharding.rules import MESH_AXES, Sharder, ShardingRules

# Kinds of chips with two cores that JAX shows as one device unless told otherwise.
ONE_DEVICE_PER_CHIP = ("TPU v4", "TPU v5")

# ------------------------------------------------------------------------------
# Devices per axis.


def resolve_mesh_shape(config: DataMeshConfig, num_devices: int) -> dict[str, int]:
    """Devices per axis, with `data=-1` resolved.

    Raises:
      ConfigError: if the product is not the number of devices; names the nearest mesh that fits.
    """
    others = math.prod(config.inner.values())
    data = num_devices // others if config.data == -1 else config.data
    shape = {"data": data, **config.inner}
    if math.prod(shape.values()) != num_devices:
        given = shape | {"data": config.data}
        wanted = " x ".join(f"{name}={size}" for name, size in given.items())
        needed = max(others, math.prod(shape.values()))
        raise ConfigError(
            "mesh",
            f"{wanted} needs {needed} devices (or a divisor for data=-1), but there are "
            f"{num_devices}. {_nearest_mesh(config, num_devices)} To try the mesh on CPU, add "
            f"--config.environment=XLA_FLAGS=--xla_force_host_platform_device_count={needed}.",
        )
    return shape


def _nearest_mesh(config: DataMeshConfig, num_devices: int, num_slices: int = 1) -> str:
    """A sentence that names the mesh whose axes differ by the smallest factors, data last."""
    axes = tuple(field.name for field in dataclasses.fields(config))

    def factor(axis: str, size: int) -> float:
        wanted = getattr(config, axis)
        return 0.0 if wanted == -1 else abs(math.log(size / wanted))

    def distance(sizes: Sequence[int]) -> tuple[float, float]:
        inner = sum(factor(*pair) for pair in zip(axes[1:], sizes[1:], strict=True))
        return inner, factor("data", sizes[0])

    best = min(_factorisations(num_devices, len(axes), num_slices), key=distance)
    named = ", ".join(f"mesh.{axis}={size}" for axis, size in zip(axes, best, strict=True))
    return f"The nearest mesh that fits is {named}."


def _factorisations(product: int, count: int, first: int) -> Iterator[tuple[int, ...]]:
    """All tuples of `count` factors; the first one is a multiple of `first`."""
    divisors = [number for number in range(1, product + 1) if product % number == 0]
    for inner in itertools.product(divisors, repeat=count - 1):
        if product % (first * math.prod(inner)) == 0:
            yield product // math.prod(inner), *inner


# ------------------------------------------------------------------------------
# Where the axes lie.


def make_mesh(config: DataMeshConfig, devices: Sequence[jax.Device]) -> Mesh:
    """A mesh with axes data, fsdp, tensor, sequence over all given devices.

    On a TPU slice each axis gets whole axes of the torus where that is possible, sequence and
    tensor first, and parts of them elsewhere. On several slices only `data` crosses the network
    between them.

    Raises:
      ConfigError: if the product of the axes is not the number of devices, or if these devices
        cannot carry such a mesh.
    """
    shape = resolve_mesh_shape(config, len(devices))
    sizes = tuple(shape.values())
    if devices[0].platform == "tpu":
        grid = _tpu_grid(config, sizes, devices)
    elif devices[0].platform == "gpu":
        grid = mesh_utils.create_device_mesh(sizes, devices)
    else:
        # Plain order keeps process 0's devices first.
        grid = np.array(devices).reshape(sizes)
    return Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def _tpu_grid(config: DataMeshConfig, sizes: tuple[int, ...], devices: Sequence[Any]) -> np.ndarray:
    slices = _by_slice(devices)
    for index, members in slices.items():
        _check_box(members, f"slice {index}" if len(slices) > 1 else "the slice")
    if len(slices) == 1:
        return mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    counts = {len(members) for members in slices.values()}
    if len(counts) > 1:
        raise ConfigError(
            "mesh",
            f"the {len(slices)} slices have {', '.join(map(str, sorted(counts)))} devices; a mesh "
            "needs slices of one size.",
        )
    if sizes[0] % len(slices):
        raise ConfigError(
            "mesh.data",
            f"{sizes[0]} is not a multiple of the {len(slices)} slices of {counts.pop()} devices "
            "each. Only axis data crosses the network between slices. "
            f"{_nearest_mesh(config, len(devices), len(slices))}",
        )
    return mesh_utils.create_hybrid_device_mesh(
        (sizes[0] // len(slices), *sizes[1:]),
        (len(slices), *(1,) * (len(sizes) - 1)),
        devices,
        allow_split_physical_axes=True,
    )


def _by_slice(devices: Iterable[Any]) -> dict[int, list[Any]]:
    """TPU devices by the index of their slice."""
    slices = defaultdict(list)
    for device in devices:
        slices[getattr(device, "slice_index", 0)].append(device)
    return dict(slices)


def _check_box(devices: Sequence[Any], name: str) -> None:
    """A mesh is laid over a box of the torus without a hole."""
    chips = {tuple(device.coords) for device in devices}
    extents = [max(places) - min(places) + 1 for places in zip(*chips, strict=True)]
    box = "x".join(map(str, extents))
    kind = devices[0].device_kind
    if len(chips) < math.prod(extents):
        raise ConfigError(
            "mesh",
            f"the {len(chips)} chips of {name} ({kind}) do not fill the {box} box that they span; "
            "use all chips of the slice.",
        )
    if len(devices) > len(chips) and kind in ONE_DEVICE_PER_CHIP:
        raise ConfigError(
            "mesh",
            f"{name} ({kind}, {box}) shows {len(devices)} devices for {len(chips)} chips; a mesh "
            "needs one for each. Use the megacore configuration (chip_config_name='megacore' of a "
            "topology that is only described).",
        )


def share_of_batch(mesh: Mesh, process: int) -> tuple[int, int]:
    """Which part of the rows of each batch a process reads, from 0, and how many parts there are.

    Rows are cut over data and fsdp. Processes whose devices hold the same rows, because another
    axis spans them, read the same part.

    Raises:
      ConfigError: if the rows of two processes overlap without being the same, or differ in number.
    """
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    held = defaultdict(list)
    for row, devices in enumerate(mesh.devices.reshape(ways, -1)):
        for index in {device.process_index for device in devices}:
            held[index].append(row)
    parts = sorted({tuple(rows) for rows in held.values()})
    is_shared = sum(map(len, parts)) > ways
    if is_shared or len({len(rows) for rows in parts}) > 1:
        raise ConfigError(
            "mesh",
            f"{' x '.join(f'{axis}={size}' for axis, size in mesh.shape.items())} would have "
            "processes share some rows of a batch and not others; use powers of two.",
        )
    return parts.index(tuple(held[process])), len(parts)


def describe_layout(mesh: Mesh) -> str:
    """What each axis of a mesh of TPUs lies on, as in 'data on 2 slices, fsdp on 4x4x2 chips'.

    Empty on other platforms, and where all axes are 1.
    """
    if mesh.devices.flat[0].platform != "tpu":
        return ""
    parts = []
    for number, (axis, size) in enumerate(mesh.shape.items()):
        if size == 1:
            continue
        line = np.moveaxis(mesh.devices, number, 0).reshape(size, -1)[:, 0]
        slices = _by_slice(line)
        chips = {tuple(device.coords) for device in next(iter(slices.values()))}
        extents = [len(set(places)) for places in zip(*chips, strict=True)]
        is_box = math.prod(extents) == len(chips)
        places = [f"{len(slices)} slices"] if len(slices) > 1 else []
        if len(chips) > 1:
            places.append(f"{'x'.join(map(str, extents)) if is_box else len(chips)} chips")
        parts.append(f"{axis} on {' of '.join(places)}")
    return ", ".join(parts)


# ------------------------------------------------------------------------------
# What a run needs of its mesh.


def make_sharder(model: ModelConfig, mesh: Mesh) -> Sharder:
    """Places the arrays of a model on a mesh.

    Where the mesh axis tensor does not divide the key/value heads, devices compute a few more heads
    of zeros, which change no result. Parameters have their usual shapes, and are cut along the
    width of a head.

    Raises:
      ConfigError: if the model does not fit the mesh.
    """
    _check_model(model, dict(mesh.shape))
    heads, tensor = model.attention.kv_heads, mesh.shape["tensor"]
    if heads % tensor == 0:
        return Sharder(mesh)
    computed = -(-heads // tensor) * tensor
    return Sharder(mesh, ShardingRules().with_whole_heads(), (heads, computed))


def check_run_fits_mesh(config: RunConfig, mesh: Mesh) -> None:
    """Checks that every sharded axis is divisible, before anything is compiled.

    Raises:
      ConfigError: naming the option, its value and the mesh axis it does not divide by.
    """
    _check_model(config.model, dict(mesh.shape))
    batch_ways = mesh.shape["data"] * mesh.shape["fsdp"]
    micro_batch = config.data.batch_size // config.train.accumulation
    _check_divides("data.batch_size (per micro-batch)", micro_batch, "data x fsdp", batch_ways)
    for _, length in config.data.batch_shapes:
        is_longest = length == config.data.sequence_length
        name = "data.sequence_length" if is_longest else "data.bucket_lengths"
        _check_divides(name, length, "sequence", mesh.shape["sequence"])
    if config.model.has_media:
        _check_sequence_with_media(config, mesh.shape["sequence"])


def model_sharder(
    config: ModelMeshConfig, model: ModelConfig, devices: Sequence[jax.Device]
) -> Sharder | None:
    """How a finished model is laid over the first devices; None: on one device.

    Raises:
      ConfigError: if there are too few devices, or the model cannot be divided so.
    """
    count = config.num_devices
    if count == 1:
        return None
    if count > len(devices):
        kinds = "device" if len(devices) == 1 else "devices"
        raise ConfigError(
            "mesh",
            f"data={config.data} x tensor={config.tensor} needs {count} devices, and there are "
            f"{len(devices)} {kinds}; choose smaller ones. To try it on CPU, set the environment "
            f"variable XLA_FLAGS=--xla_force_host_platform_device_count={count}.",
        )
    mesh = make_mesh(MeshConfig(data=config.data, tensor=config.tensor), devices[:count])
    return make_sharder(model, mesh)


def _check_sequence_with_media(config: RunConfig, ways: int) -> None:
    images, clips = media_places(config)
    length = config.data.sequence_length + images + clips
    if length % ways:
        raise ConfigError(
            "mesh.sequence",
            f"{ways} does not divide the {length} places of a sequence: data.sequence_length="
            f"{config.data.sequence_length}, and {images} of images and {clips} of sound; change "
            "data.sequence_length, or use a smaller mesh axis.",
        )


def _check_model(model: ModelConfig, shape: dict[str, int]) -> None:
    tensor, fsdp = shape["tensor"], shape["fsdp"]
    if model.attention.kv_heads % tensor:
        _check_padded_heads(model, tensor)
    if model.mlp.kind == "peer":
        _check_divides("model.mlp.peer.num_experts", model.mlp.peer.num_experts, "tensor", tensor)
    else:
        _check_divides("model.mlp.hidden_width", model.mlp.hidden_width, "tensor", tensor)
    _check_divides("model.vocab_size", model.vocab_size, "tensor", tensor)
    _check_divides("model.width", model.width, "fsdp", fsdp)
    if model.is_recurrent:
        _check_divides("model.recurrence.core_width", model.core_width, "fsdp", fsdp)
    if model.image.enabled and model.image.decoder.kind == "dit":
        dit, path = model.image.decoder.dit, "model.image.decoder.dit"
        _check_divides(f"{path}.width", dit.width, "fsdp", fsdp)
        _check_divides(f"{path}.num_heads", dit.num_heads, "tensor", tensor)
        _check_divides(f"{path}.hidden_width", dit.hidden_width, "tensor", tensor)


def _check_padded_heads(model: ModelConfig, tensor: int) -> None:
    """What else must hold where tensor does not divide the heads."""
    heads, obstacle = model.attention.kv_heads, ""
    widths = (model.head_dim(model.width), model.head_dim(model.core_width))
    if heads < tensor:
        obstacle = "there are fewer of them"
    elif any(width % tensor for width in widths):
        obstacle = f"{tensor} does not divide the width {widths[0]} of a head either"
    elif model.has_media:
        obstacle = "the model has images or sound"
    elif model.value_embedding.layers:
        obstacle = "the model has value embeddings"
    elif model.attention.qk_norm and model.attention.qk_norm_span == "width":
        obstacle = "model.attention.qk_norm_span='width' normalises all of them together"
    elif model.recurrence.loop_lora_rank:
        obstacle = "model.recurrence.loop_lora_rank is above 0"
    if obstacle:
        raise ConfigError(
            "model.attention.num_kv_heads",
            f"{heads} is not divisible by the {tensor} devices of mesh axis tensor, and heads "
            f"cannot be filled up because {obstacle}; choose a multiple of {tensor} or a smaller "
            "mesh axis.",
        )


def _check_divides(name: str, value: int, axis: str, ways: int) -> None:
    if value % ways:
        raise ConfigError(
            name,
            f"{value} is not divisible by the {ways} devices of mesh axis {axis}; "
            f"choose a multiple of {ways} or a smaller mesh axis.",
        )
