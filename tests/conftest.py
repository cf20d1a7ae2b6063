"""Test-wide set-up: eight fake CPU devices, a compilation cache, checked array shapes.

The environment must be set before JAX is imported, so this file imports it nowhere.
"""

import contextlib
import copy
import gc
import os
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import array_checks
import pytest
from bucket_server import Bucket, serve_bucket
from cheap_compilation import CHEAP_COMPILATION

REPOSITORY = pathlib.Path(__file__).resolve().parent.parent
NUM_DEVICES = 8
# Linux gives a process 65,530 memory maps and every compiled program takes some; without any left,
# the next compilation ends the process with a segmentation fault.
MAX_MEMORY_MAPS = 20_000

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = (
    f"--xla_force_host_platform_device_count={NUM_DEVICES} {CHEAP_COMPILATION}"
)
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(REPOSITORY / ".jax_cache"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")
os.environ["MPLBACKEND"] = "Agg"
# Read when gcsfs is imported: without it every call asks a service that is not emulated.
os.environ["GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"] = "false"

with contextlib.suppress(ImportError):  # `make smoke` does without it.
    import hypothesis

    # The same examples in every run, and none that fails because the machine is busy.
    hypothesis.settings.register_profile("steady", deadline=None, derandomize=True)
    hypothesis.settings.load_profile("steady")

# Tracing makes millions of objects that die young; looking for cycles in them took 5% of the time.
gc.set_threshold(50_000, 20, 20)

# Array shapes and types are checked here and not in production. Configuration has its own checks,
# whose messages are tested, so it is left out.
array_checks.install(
    [
        f"megatransformer_jax.{layer}"
        for layer in ("ops", "nn", "models", "losses", "generation", "training", "evaluation")
    ]
)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Options for what takes too long to be done in every run of the tests."""
    parser.addoption(
        "--train-all",
        action="store_true",
        help="tests/docs/pages_run_test.py trains by every training command of the documentation",
    )
    parser.addoption(
        "--serve-all",
        action="store_true",
        help="tests/serving/app_schema_test.py sends several hundred requests",
    )


def pytest_ignore_collect(collection_path: pathlib.Path, config: pytest.Config) -> bool | None:
    """`pytest -m smoke` reads only files with such tests: others need packages of extras."""
    if config.getoption("markexpr") != "smoke" or not collection_path.name.endswith("_test.py"):
        return None
    return "pytest.mark.smoke" not in collection_path.read_text(encoding="utf-8") or None


@pytest.fixture(scope="module", autouse=True)
def _room_for_compiled_programs() -> Iterator[None]:
    """Drops compiled programs after a file of tests if they have become too many."""
    yield
    maps = pathlib.Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > MAX_MEMORY_MAPS:
        import jax  # noqa: PLC0415

        jax.clear_caches()


def pytest_sessionfinish() -> None:
    """pytest's own searches for cycles come after this; in the heap of all tests they take long."""
    gc.freeze()


@pytest.fixture(scope="session")
def repository() -> pathlib.Path:
    """The root of the checkout."""
    return REPOSITORY


@pytest.fixture(scope="session")
def huginn_fixture() -> pathlib.Path:
    """Folder with Huginn's reference weights and outputs; skips the test if it is absent."""
    return _reference_folder("huginn_tiny")


@pytest.fixture(scope="session")
def parcae_fixture() -> pathlib.Path:
    """The same of Parcae."""
    return _reference_folder("parcae_tiny")


@pytest.fixture(scope="session")
def gs_bucket(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bucket]:
    """A bucket at gs://, for all tests of this process; each has a folder of its own in it."""
    with serve_bucket("gs", tmp_path_factory.mktemp("gs")) as bucket:
        yield bucket


@pytest.fixture(scope="session")
def s3_bucket(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bucket]:
    """The same at s3://."""
    with serve_bucket("s3", tmp_path_factory.mktemp("s3")) as bucket:
        yield bucket


def _reference_folder(name: str) -> pathlib.Path:
    folder = REPOSITORY.parent / "shared" / "fixtures" / name
    if not folder.is_dir():
        pytest.skip(f"reference data is not here: {folder}")
    return folder


# The smallest run that still has everything: dropout, random depths, packing, checkpoints.
SMALL_RUN: dict[str, Any] = {
    "model": {
        "vocab_size": 264,
        "width": 16,
        "core_layers": 1,
        "residual_dropout_rate": 0.1,
        "attention": {"num_heads": 2},
        "mlp": {"hidden_width": 16},
        "recurrence": {"mean_steps": 2, "max_steps": 6, "backprop_depth": 2},
    },
    "data": {
        "source": "embedded_text",
        "batch_size": 8,
        "sequence_length": 16,
        "tokenizer": {"kind": "bytes"},
    },
    "optimizer": {"warmup_steps": 2},
    "train": {"steps": 12},
    "checkpoint": {"every_steps": 4},
    "evaluation": {"every_steps": 8, "num_batches": 1, "final_depths": [1, 2, 4]},
    "samples": {"every_steps": 0},
    "logging": {"every_steps": 5, "progress": "lines"},
}


@pytest.fixture(scope="session")
def small_run() -> Callable[..., dict[str, Any]]:
    """Values of the small run, changed by nested values."""

    from megatransformer_jax.config.build import merge  # noqa: PLC0415 (after the import hook)

    def values(workdir: Any, changes: dict[str, Any] | None = None) -> dict[str, Any]:
        base = merge(copy.deepcopy(SMALL_RUN), {"workdir": str(workdir)})
        return merge(base, changes or {})

    return values
