import builtins
import importlib.util
import os
import subprocess
import sys
import types

import jax
import pytest

from megatransformer_jax.config.option import ConfigError, UserError
from megatransformer_jax.sharding.devices import device_kind
from megatransformer_jax.sharding.topology import (
    GPU_KINDS,
    QUIET_ENVIRONMENT,
    SLICE_KINDS,
    describe_devices,
    gpu_description,
    parse_topology,
)


@pytest.mark.parametrize(
    ("name", "box", "chips"),
    [
        ("v4-8", (2, 2, 1), 4),
        ("v4-128", (4, 4, 4), 64),
        ("V4-512", (4, 8, 8), 256),
        ("v5p-64", (2, 4, 4), 32),
        ("v5e-256", (16, 16), 256),
        ("v5litepod-16", (4, 4), 16),
        ("v6e-8", (2, 4), 8),
        ("v6e:16x16", (16, 16), 256),
        ("v4:2x2x3", (2, 2, 3), 12),
        ("v5e:1x1", (1, 1), 1),
        ("h100-8", (8,), 8),
        ("A100-80GB-4", (4,), 4),
    ],
)
def test_names_of_accelerators_and_boxes(name, box, chips):
    topology = parse_topology(name)
    assert (topology.box, topology.chips) == (box, chips)
    assert parse_topology(str(topology)) == topology


def test_numbers_of_a_kind_count_what_its_clouds_count():
    for kind in SLICE_KINDS.values():
        for name in kind.accelerators():
            chips = parse_topology(name, slices=2).chips
            assert chips * kind.cores_per_chip == 2 * int(name.partition("-")[2])


@pytest.mark.parametrize(
    ("name", "slices", "path", "message"),
    [
        ("v4", 1, "topology", "'v4' is not the name of a slice or a machine; write it as v4-"),
        ("v4-100", 1, "topology", r"no such accelerator; known: v4-8, v4-16, .*cores, 2 per chip"),
        ("v5e-12", 1, "topology", r"known: v5e-1, .*counts chips\). .*as v5e:4x4"),
        ("v3-8", 1, "topology", "'v3' is not a kind of TPU or GPU that is known; .*v4, .*, b200"),
        ("h100-16", 1, "topology", "1 to 8 GPUs; for more write h100-8 and say with `slices`"),
        ("l4-0", 1, "topology", "1 to 8 GPUs"),
        ("h100:2x4", 1, "topology", "the kind of its GPUs and their number, 1 to 8; write h100-8"),
        ("a100-8", 1, "topology", "write a100-40gb-8 or a100-80gb-8"),
        ("h100", 1, "topology", "write h100-8"),
        ("h100-8", 10_000, "slices", "80000 chips; at most 65536 are described, so name fewer"),
        ("v4:4x4", 1, "topology", "box of 3 dimensions; write it as v4:2x4x4"),
        ("v5e:3x4", 1, "topology", "each host has 2x2 chips"),
        ("v5e:4x0", 1, "topology", "box of 2 dimensions"),
        ("v4-8", 0, "slices", "0 slices"),
        ("v4:64x64x64", 1, "topology", "262144 chips; at most 65536"),
        ("v4-8", 2**31 - 1, "slices", "at most 65536"),
    ],
)
def test_what_is_not_a_slice_names_those_there_are(name, slices, path, message):
    with pytest.raises(ConfigError, match=message) as caught:
        parse_topology(name, slices)
    assert caught.value.path == path


def test_without_libtpu_the_error_names_the_extra(monkeypatch):
    import_module = builtins.__import__
    monkeypatch.setattr(
        "importlib.import_module",
        lambda name, *rest: (
            (_ for _ in ()).throw(ImportError(f"No module named {name!r}"))
            if name == "libtpu"
            else import_module(name, *rest)
        ),
    )
    with pytest.raises(UserError, match=r"extra 'tpu': pip install 'megatransformer_jax\[tpu\]'"):
        describe_devices(parse_topology("v4-8"))


@pytest.mark.parametrize(
    ("raised", "message"),
    [
        (
            NotImplementedError("topology not implemented for cuda"),
            r"h100-8: .*extra 'cuda' \(no GPU is needed\)",
        ),
        (
            jax.errors.JaxRuntimeError("FAILED_PRECONDITION: no such field"),
            r"cannot describe these GPUs .*of the same version as jax",
        ),
    ],
    ids=["no plugin", "another plugin"],
)
def test_a_plugin_that_does_not_describe_gpus_is_an_error_that_names_the_fix(
    raised, message, monkeypatch
):
    def describe(*args, **options):
        raise raised

    monkeypatch.setattr("jax.experimental.topologies.get_topology_desc", describe)
    with pytest.raises(UserError, match=message):
        describe_devices(parse_topology("h100-8"))


def test_machines_with_gpus_are_described_to_the_plugin(monkeypatch):
    told = {}

    def describe(name, platform, **options):
        told.update(options, platform=platform)
        return types.SimpleNamespace(devices=["some"])

    monkeypatch.setattr("jax.experimental.topologies.get_topology_desc", describe)
    assert describe_devices(parse_topology("h200-4", slices=2)) == ["some"]
    assert (told["platform"], told["topology"]) == ("cuda", "1x2x4")
    description = told["target_config"]
    assert "device_description_str: 'NVIDIA H200'" in description
    assert "cuda_compute_capability { major: 9 minor: 0 }" in description
    assert f"device_memory_size: {140 * 2**30} " in description
    assert "shared_memory_per_block_optin: 232448 " in description  # 227 KiB


@pytest.mark.parametrize("kind", GPU_KINDS.values(), ids=GPU_KINDS)
def test_each_gpu_is_one_that_inspect_knows_and_can_be_described(kind):
    assert device_kind(kind.name).platform == "gpu"
    assert gpu_description(kind).count("{") == gpu_description(kind).count("}")
    assert parse_topology(f"{kind.name}-1").gpu is kind


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")
def test_libtpu_is_silent_about_a_tpu_that_is_not_here(repository):
    """And what it is told does not stay in the environment."""
    # JAX sets TPU_SKIP_MDS_QUERY itself where there is no TPU.
    told = ["TPU_WORKER_HOSTNAMES", "TPU_ACCELERATOR_TYPE"]
    assert set(told) < set(QUIET_ENVIRONMENT)
    program = f"""
import os
from megatransformer_jax.sharding.topology import describe_devices, parse_topology
print(len(describe_devices(parse_topology("v5e-4"))), [n for n in {told} if n in os.environ])
"""
    environment = {name: value for name, value in os.environ.items() if name not in told}
    environment |= {"JAX_PLATFORMS": "cpu", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=repository,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert (done.stdout, done.stderr) == ("4 []\n", "")
