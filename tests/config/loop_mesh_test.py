"""The mesh of a configuration against the devices there are."""

from typing import Any

import jax
import pytest

from megatransformer_jax.config.build import build
from megatransformer_jax.config.loop import MeshConfig
from megatransformer_jax.config.option import ConfigError
from megatransformer_jax.sharding.mesh import check_run_fits_mesh, make_mesh, resolve_mesh_shape


def test_the_data_axis_takes_what_the_others_leave() -> None:
    shape = resolve_mesh_shape(MeshConfig(fsdp=2, tensor=2), num_devices=8)
    assert shape == {"data": 2, "fsdp": 2, "tensor": 2, "sequence": 1}


@pytest.mark.parametrize(
    ("mesh", "needed"),
    [
        (MeshConfig(data=4, fsdp=4), 16),
        (MeshConfig(data=2), 2),
        (MeshConfig(fsdp=16), 16),
        (MeshConfig(tensor=3), 6),
    ],
)
def test_a_product_other_than_the_number_of_devices_is_an_error(
    mesh: MeshConfig, needed: int
) -> None:
    with pytest.raises(ConfigError, match=f"needs {needed} devices.* but there are 8") as caught:
        resolve_mesh_shape(mesh, num_devices=8)
    assert caught.value.path == "mesh"


def test_the_error_shows_the_axes_as_they_were_given() -> None:
    with pytest.raises(ConfigError, match="data=-1 x fsdp=1 x tensor=4 x sequence=1 needs 4"):
        resolve_mesh_shape(MeshConfig(tensor=4), num_devices=1)


def test_the_sequence_axis_divides_every_bucket() -> None:
    mesh = make_mesh(MeshConfig(data=2, sequence=4), jax.devices())
    data = {"packing": "bucket", "bucket_lengths": (32, 256)}
    check_run_fits_mesh(build({"data": data}), mesh)
    with pytest.raises(ConfigError, match="62 is not divisible by the 4 devices") as caught:
        check_run_fits_mesh(build({"data": data | {"bucket_lengths": (62, 256)}}), mesh)
    assert caught.value.path == "data.bucket_lengths"


def test_the_tensor_axis_divides_the_heads_of_a_transformer_that_draws() -> None:
    mesh = make_mesh(MeshConfig(data=4, tensor=2), jax.devices())

    def model_with(num_heads: int) -> dict[str, Any]:
        dit = {"width": 36, "num_heads": num_heads}
        image = {"enabled": True, "decoder": {"kind": "dit", "dit": dit}}
        media = {"source": "media", "tokenizer": {"kind": "bytes"}, "media": {"tasks": ("draw=1",)}}
        return {"model": {"image": image, "vocab_size": 272}, "data": media}

    check_run_fits_mesh(build(model_with(2)), mesh)
    with pytest.raises(ConfigError, match="3 is not divisible by the 2 devices") as caught:
        check_run_fits_mesh(build(model_with(3)), mesh)
    assert caught.value.path == "model.image.decoder.dit.num_heads"
