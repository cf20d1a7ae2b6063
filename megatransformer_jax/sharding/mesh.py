"""Builds the device mesh from the config and checks that devices, model and batch fit it."""

import math
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from megatransformer_jax.config.loop import DataMeshConfig
from megatransformer_jax.config.model import ModelConfig
from megatransformer_jax.config.option import ConfigError
from megatransformer_jax.config.run import RunConfig
from megatransformer_jax.config.run_rules import media_places
from megatransformer_jax.sharding.rules import MESH_AXES


def resolve_mesh_shape(config: DataMeshConfig, num_devices: int) -> dict[str, int]:
    """Devices per axis, with `data=-1` resolved.

    Raises:
      ConfigError: if the product is not the number of devices.
    """
    others = math.prod(config.inner.values())
    data = num_devices // others if config.data == -1 else config.data
    shape = {"data": data, **config.inner}
    if math.prod(shape.values()) != num_devices:
        given = shape | {"data": config.data}
        wanted = " x ".join(f"{name}={size}" for name, size in given.items())
        raise ConfigError(
            "mesh",
            f"{wanted} needs {max(others, math.prod(shape.values()))} devices (or a divisor for "
            f"data=-1), but there are {num_devices}. Change the mesh, or for a try on CPU add "
            f"--config.environment=XLA_FLAGS=--xla_force_host_platform_device_count="
            f"{max(others, math.prod(shape.values()))}.",
        )
    return shape


def make_mesh(config: DataMeshConfig, devices: Sequence[jax.Device]) -> Mesh:
    """A mesh with axes data, fsdp, tensor, sequence over all given devices.

    Raises:
      ConfigError: if the product of the axes is not the number of devices.
    """
    shape = resolve_mesh_shape(config, len(devices))
    auto = (AxisType.Auto,) * len(MESH_AXES)
    if devices[0].platform == "cpu":
        # The topology-aware order of make_mesh has no meaning here, and plain order keeps
        # process 0's devices first.
        grid = np.array(devices).reshape(tuple(shape.values()))
        return Mesh(grid, MESH_AXES, axis_types=auto)
    return jax.make_mesh(tuple(shape.values()), MESH_AXES, axis_types=auto, devices=devices)


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
    _check_divides("model.attention.num_kv_heads", model.attention.kv_heads, "tensor", tensor)
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


def _check_divides(name: str, value: int, axis: str, ways: int) -> None:
    if value % ways:
        raise ConfigError(
            name,
            f"{value} is not divisible by the {ways} devices of mesh axis {axis}; "
            f"choose a multiple of {ways} or a smaller mesh axis.",
        )
