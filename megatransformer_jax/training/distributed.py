"""Joins several processes into one run, and makes global arrays of what each one read."""

import contextlib
import re
from collections.abc import Iterator
from typing import Any

import jax
from jax.experimental import multihost_utils

from megatransformer_jax.config.loop import DistributedConfig
from megatransformer_jax.config.option import TRY_AGAIN, ConfigError, UserError
from megatransformer_jax.failures import chain_of
from megatransformer_jax.sharding.mesh import share_of_batch
from megatransformer_jax.sharding.rules import Sharder
from megatransformer_jax.types import Batch


def start_distributed(config: DistributedConfig) -> None:
    """Connects this process to the others. Must come before the first use of a device.

    Does nothing if the run is a single process (`enabled=False`).

    Raises:
      ConfigError: if JAX finds no cluster by itself and the options do not describe one.
      RuntimeError: if a device was used before, or the coordinator cannot be reached.
    """
    if not config.enabled:
        return
    if config.coordinator is None:
        try:
            jax.distributed.initialize(
                initialization_timeout=config.initialization_seconds,
                heartbeat_timeout_seconds=config.heartbeat_seconds,
            )
        except ValueError as error:  # What JAX found is not enough.
            raise ConfigError(
                "distributed.coordinator",
                "None, and this machine belongs to no cluster that JAX knows (a TPU pod, SLURM, "
                "Open MPI, Kubernetes); give distributed.coordinator, distributed.num_processes "
                "and distributed.process_id, or set distributed.enabled=False.",
            ) from error
        return
    jax.distributed.initialize(
        coordinator_address=config.coordinator,
        num_processes=config.num_processes,
        process_id=config.process_id,
        initialization_timeout=config.initialization_seconds,
        heartbeat_timeout_seconds=config.heartbeat_seconds,
    )


class LostProcess(UserError):
    """Another process of the run has ended or cannot be reached, so this one cannot go on."""

    exit_code = TRY_AGAIN


@contextlib.contextmanager
def naming_lost_processes() -> Iterator[None]:
    """In a run of several processes: what fails in the block for want of another is `LostProcess`.

    Devices and JAX's coordination service report a lost process as an error of the program that
    waits for it. Errors that the program makes itself, such as too little memory, are not changed.

    Raises:
      LostProcess: instead of such errors.
    """
    try:
        yield
    except Exception as error:
        reason = lost_process_reason(error) if jax.process_count() > 1 else None
        if reason is None:
            raise
        raise LostProcess(
            f"process {jax.process_index()} of {jax.process_count()} waited for another, which has "
            f"ended or cannot be reached ({reason}); start all processes again: the run goes on "
            "from its newest checkpoint."
        ) from error


# How devices and the coordination service call it.
_LOST = re.compile(
    r"UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED|CANCELLED|[Gg]loo|[Cc]onnection (?:reset|closed)"
    r"|unhealthy|[Hh]eartbeat|timed out"
)
_REASON_LENGTH = 160


def lost_process_reason(error: BaseException) -> str | None:
    """What a device or the coordination service said of a lost process; None of other errors.

    Examples:
      >>> lost_process_reason(jax.errors.JaxRuntimeError("UNAVAILABLE: Socket closed"))
      'UNAVAILABLE: Socket closed'
      >>> lost_process_reason(jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory"))
    """
    for one in chain_of(error):
        text = " ".join(str(one).split())
        if isinstance(one, jax.errors.JaxRuntimeError) and _LOST.search(text):
            return text[:_REASON_LENGTH]
    return None


def wait_for_all(name: str) -> None:
    """Returns when every process has called it with this name; at once in a single process."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def make_global(array: Any, sharder: Sharder, *axes: str | None) -> jax.Array:
    """Puts the rows that this process read onto the mesh, as its part of a global array.

    Args:
      array: NumPy array of the rows of `share_of_batch`, whole along all other axes.
      sharder: names the mesh.
      axes: logical names of the leading axes, 'batch' first.
    """
    assert sharder.mesh is not None
    _, parts = share_of_batch(sharder.mesh, jax.process_index())
    shape = (array.shape[0] * parts, *array.shape[1:])
    return jax.make_array_from_process_local_data(sharder.sharding(*axes), array, shape)


def make_global_batch(batch: Batch, sharder: Sharder) -> Batch:
    """Puts the rows that this process read onto the mesh, as its part of the global batch.

    Args:
      batch: NumPy arrays, [B / parts, T] of text, and [B / parts, ...] of media; `share_of_batch`
        counts the parts.
      sharder: names the mesh; the arrays are cut as axes ('batch', 'length') and ('batch', ...).

    Returns:
      Global arrays, [B, ...].
    """
    text = [make_global(array, sharder, "batch", "length") for array in batch[:-1]]
    media = jax.tree.map(lambda array: make_global(array, sharder, "batch"), batch.media)
    return Batch._make([*text, media])
