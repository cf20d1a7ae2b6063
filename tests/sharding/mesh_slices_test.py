"""Meshes over slices of TPUs: described chips, and topologies by libtpu where it is installed."""

import dataclasses
import importlib.util
import json
import math
import os
import subprocess
import sys

import pytest
from tpu_chips import Chip, torus

from megatransformer_jax.config.loop import DataMeshConfig, MeshConfig
from megatransformer_jax.config.option import ConfigError
from megatransformer_jax.sharding.mesh import describe_layout, make_mesh, share_of_batch


def test_an_axis_takes_a_part_of_an_axis_of_the_torus():
    mesh = make_mesh(MeshConfig(data=2, fsdp=32), torus(4, 4, 4))
    assert {chip.coords[2] // 2 for chip in mesh.devices[0].flat} == {0}
    assert describe_layout(mesh) == "data on 1x1x2 chips, fsdp on 4x4x2 chips"
    whole = make_mesh(MeshConfig(fsdp=16), torus(4, 4, 4))
    assert describe_layout(whole) == "data on 1x1x4 chips, fsdp on 4x4x1 chips"


def test_only_data_crosses_the_network_between_slices():
    slices = [*torus(2, 2, 4, 0), *torus(2, 2, 4, 1)]
    mesh = make_mesh(MeshConfig(fsdp=8), slices)
    assert [{chip.slice_index for chip in row.flat} for row in mesh.devices] == [{0}, {0}, {1}, {1}]
    assert describe_layout(mesh) == "data on 2 slices of 1x2x1 chips, fsdp on 2x1x4 chips"
    assert describe_layout(make_mesh(MeshConfig(fsdp=16), slices)).startswith("data on 2 slices,")


def hosts(chips: list[Chip]) -> list[Chip]:
    """Each square of 2x2 chips is a host with a process."""
    return [
        dataclasses.replace(chip, process_index=chip.coords[0] // 2 + 2 * (chip.coords[1] // 2))
        for chip in chips
    ]


@pytest.mark.parametrize(
    ("config", "shares"),
    [
        (MeshConfig(), [(0, 4), (1, 4), (2, 4), (3, 4)]),
        # A column of four chips lies on two hosts, which so hold the same rows.
        (MeshConfig(tensor=4), [(0, 2), (0, 2), (1, 2), (1, 2)]),
        (MeshConfig(fsdp=4, sequence=4), [(0, 2), (0, 2), (1, 2), (1, 2)]),
        (MeshConfig(tensor=2, sequence=8), [(0, 1)] * 4),
    ],
)
def test_processes_that_hold_the_same_rows_read_the_same_part(config, shares):
    mesh = make_mesh(config, hosts(torus(4, 4, 1)))
    found = [share_of_batch(mesh, process) for process in range(4)]
    assert sorted(found) == shares
    rows = mesh.devices.reshape(mesh.shape["data"] * mesh.shape["fsdp"], -1)
    for process, (part, parts) in enumerate(found):
        held = {n for n, row in enumerate(rows) if process in {c.process_index for c in row}}
        others = [
            {n for n, row in enumerate(rows) if other in {c.process_index for c in row}}
            for other in range(4)
            if found[other][0] == part
        ]
        assert all(held == same for same in others) and len(held) * parts == len(rows)


def test_rows_that_overlap_in_part_are_an_error():
    chips = [dataclasses.replace(chip, process_index=chip.id // 2) for chip in torus(6, 1, 1)]
    mesh = make_mesh(MeshConfig(tensor=3), chips)
    with pytest.raises(ConfigError, match="data=2 x fsdp=1 x tensor=3 x sequence=1 would have"):
        share_of_batch(mesh, 0)


@pytest.mark.parametrize(
    ("config", "devices", "path", "message"),
    [
        (
            MeshConfig(fsdp=32),
            [*torus(2, 2, 4, 0), *torus(2, 2, 4, 1)],
            "mesh.data",
            r"1 is not a multiple of the 2 slices of 16 devices each.*"
            r"mesh\.data=2, mesh\.fsdp=16, mesh\.tensor=1, mesh\.sequence=1",
        ),
        (
            DataMeshConfig(data=1, fsdp=8),
            [*torus(2, 2, 1, 0), *torus(2, 2, 1, 1)],
            "mesh.data",
            r"fits is mesh\.data=2, mesh\.fsdp=4\.",
        ),
        (MeshConfig(), [*torus(2, 2, 1, 0), *torus(2, 2, 2, 1)], "mesh", "have 4, 8 devices"),
        (MeshConfig(), torus(2, 2, 2)[:7], "mesh", "7 chips of the slice .* the 2x2x2 box"),
        (MeshConfig(), torus(2, 2, 1, cores=2), "mesh", "shows 8 devices for 4 chips.*megacore"),
        (
            MeshConfig(fsdp=64, tensor=2),
            torus(4, 4, 4),
            "mesh",
            r"needs 128 devices .*there are 64.*mesh\.data=1, mesh\.fsdp=32, mesh\.tensor=2,",
        ),
    ],
)
def test_what_cannot_be_built_names_what_is_there_and_the_nearest(config, devices, path, message):
    with pytest.raises(ConfigError, match=message) as caught:
        make_mesh(config, devices)
    assert caught.value.path == path


# ------------------------------------------------------------------------------
# By libtpu, which describes slices that are not here. One process asks for all of them.

SLICES = {
    "v4": ("2x2x1", "2x2x4", "4x4x4", "4x8x8"),
    "v5p": ("4x4x4",),
    "v5e": ("2x4", "16x16"),
    "v6e": ("4x4", "16x16"),
}
PROGRAM = """
import itertools, json, math, sys
from jax.experimental import topologies
from megatransformer_jax.config.loop import MeshConfig
from megatransformer_jax.config.option import ConfigError
from megatransformer_jax.sharding.mesh import make_mesh

for kind, extents, slices in json.loads(sys.argv[1]):
    megacore = "megacore" if kind == "v4" else "default"
    several = {"num_slices": slices} if slices > 1 else {}
    devices = topologies.get_topology_desc(
        f"{kind}:{extents}", "tpu", chip_config_name=megacore, **several
    ).devices
    powers = [2**power for power in range(len(devices).bit_length())]
    built = refused = 0
    for fsdp, tensor in itertools.product(powers, repeat=2):
        if fsdp * tensor > len(devices):
            continue
        try:
            mesh = make_mesh(MeshConfig(fsdp=fsdp, tensor=tensor), devices)
        except ConfigError as error:
            assert error.path == "mesh.data", error
            refused += 1
            continue
        built += len(set(map(id, mesh.devices.flat))) == len(devices)
    print(json.dumps([len(devices), built, refused]))
"""


@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="needs libtpu, which describes TPU slices: pip install 'jax[tpu]'",
)
def test_all_powers_of_two_on_slices_of_every_kind(repository):
    asked = [(kind, extents, 1) for kind, sizes in SLICES.items() for extents in sizes]
    asked += [("v4", "2x2x4", 2), ("v6e", "4x4", 2)]
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": "v4-8",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }
    lines = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(asked)],
        cwd=repository,
        env=environment,
        stdout=subprocess.PIPE,
        check=True,
        text=True,
    ).stdout.splitlines()
    for (_, extents, slices), line in zip(asked, lines, strict=True):
        devices = slices * math.prod(map(int, extents.split("x")))
        power = devices.bit_length() - 1
        meshes = (power + 1) * (power + 2) // 2  # data x fsdp x tensor
        without_data = power + 1  # data=1 leaves the second slice without work
        refused = 0 if slices == 1 else without_data
        assert json.loads(line) == [devices, meshes - refused, refused], (extents, slices)
