"""Chooses the size of the micro-batch by the memory that the compiled step says it takes.

The step is compiled ahead of time for smaller and smaller micro-batches until it fits, and the
program that fits is the one that trains: nothing is compiled twice and nothing is allocated to find
out.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils

from megatransformer_jax.config.option import ConfigError
from megatransformer_jax.training.state import TrainState
from megatransformer_jax.training.step import LossStep, Metrics, TrainStep

GIB = 2**30
OPTION = "train.memory_budget_gib"
# Share of a device's memory that an automatic budget takes: the rest is for what is not the step.
# On a CPU it is shared with all else that runs on the machine.
DEVICE_SHARE, HOST_SHARE = 0.9, 0.5
BatchShape = tuple[tuple[int, ...], ...]  # of all arrays of a batch


@runtime_checkable
class StepProgram(Protocol):
    """A train step compiled for one shape of batch (`jax.stages.Compiled`)."""

    def __call__(self, state: TrainState, batch: Any) -> tuple[TrainState, Metrics]:
        """Runs it; the state is donated."""

    def memory_analysis(self) -> Any:
        """The compiler's numbers, or None if it has none."""


class StepMemory(NamedTuple):
    """Bytes on one device while a compiled step runs, as its compiler counts them.

    Attributes:
      arguments: the train state and the batch.
      outputs: what is returned beyond arguments that are overwritten (the donated state).
      temporaries: activations, gradients and whatever else lives in between.
    """

    arguments: int
    outputs: int
    temporaries: int

    @property
    def total(self) -> int:
        """All together."""
        return self.arguments + self.outputs + self.temporaries

    def __str__(self) -> str:
        return (
            f"{self.total / GIB:.4g} GiB (state and batch {self.arguments / GIB:.4g}, results "
            f"{self.outputs / GIB:.4g}, temporaries {self.temporaries / GIB:.4g})"
        )


class CompiledStep:
    """A train step for the shapes of batch that it was compiled for.

    Args:
      programs: compiled, by `shape_of` of the batch.
      memory: of the one that takes the most.
    """

    def __init__(self, programs: Mapping[BatchShape, StepProgram], memory: StepMemory):
        self._programs = dict(programs)
        self.memory = memory

    def __call__(self, state: TrainState, batch: Any) -> tuple[TrainState, Metrics]:
        """Runs the program of the batch's shape; the state is donated."""
        return self._programs[shape_of(batch)](state, batch)


def shape_of(batch: Any) -> BatchShape:
    """The shapes of all arrays of a batch, or of what stands for them."""
    return tuple(leaf.shape for leaf in jax.tree.leaves(batch))


def budget_in_gib(budget: float | str) -> float:
    """`train.memory_budget_gib` as a number, the same on every process.

    auto: of the devices of all processes the one with the least memory decides.
    """
    if not isinstance(budget, str):
        return budget
    own = min(map(_automatic_budget, jax.local_devices()))
    if jax.process_count() > 1:
        own = float(np.min(multihost_utils.process_allgather(np.float32(own))))
    logging.info("%s=auto: %.4g GiB on each device", OPTION, own)
    return own


def _automatic_budget(device: Any) -> float:
    statistics = device.memory_stats()
    if statistics and "bytes_limit" in statistics:
        return DEVICE_SHARE * statistics["bytes_limit"] / GIB
    if device.platform != "cpu":
        raise ConfigError(
            OPTION,
            f"'auto' needs a device that tells how much memory it has, and {device.device_kind!r} "
            "does not; give a number of GiB.",
        )
    # Devices on one CPU share its memory.
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return HOST_SHARE * total / GIB / jax.local_device_count()


def possible_accumulations(batch_size: int, batch_ways: int) -> list[int]:
    """Divisors of the batch whose micro-batches can be cut for the devices, ascending.

    Args:
      batch_size: rows of the batch.
      batch_ways: devices over which rows are cut (mesh axes data x fsdp).
    """
    divisors = [parts for parts in range(1, batch_size + 1) if batch_size % parts == 0]
    return [parts for parts in divisors if batch_size // parts % batch_ways == 0]


def compile_step(train_step: TrainStep | LossStep, state: TrainState, batch: Any) -> StepProgram:
    """Compiles a step that overwrites its state, from shapes alone; see `lower_step`."""
    return lower_step(train_step, state, batch).compile()


def lower_step(
    train_step: TrainStep | LossStep, state: TrainState, batch: Any
) -> jax.stages.Lowered:
    """A step that overwrites its state, for the devices of its arguments, not compiled yet.

    Args:
      train_step: not yet jitted.
      state: ShapeDtypeStructs with shardings; the new state gets the same.
      batch: ShapeDtypeStructs with shardings.
    """
    out_shardings = (jax.tree.map(lambda leaf: leaf.sharding, state), None)
    step = jax.jit(train_step, donate_argnums=0, out_shardings=out_shardings)
    return step.lower(state, batch)


def choose_accumulation(
    compile_for: Callable[[int, Any], StepProgram],
    accumulations: Sequence[int],
    batches: Sequence[Any],
    budget_gib: float,
) -> tuple[int, CompiledStep]:
    """The smallest accumulation whose step fits the budget on every device, and that step.

    Candidates are tried in their order, because memory need not fall from one to the next: more
    than one micro-batch also needs a sum of gradients.

    Args:
      compile_for: compiles the step with this accumulation for a batch.
      accumulations: candidates, ascending.
      batches: ShapeDtypeStructs of every kind of batch, from the shortest rows to the longest; the
        step must fit with each of them.
      budget_gib: what one device may use for the step.

    Raises:
      ConfigError: if no candidate fits, naming the least that is needed (or, where they alone
        are too much, what state and batch take) and what lowers it.
    """
    least: tuple[float, str] = (float("inf"), "more memory than the device has")
    for parts in accumulations:
        try:
            step = _compile_all(compile_for, parts, batches, budget_gib)
        except _DoesNotFit as error:
            logging.info("accumulation=%d takes %s on a device: too much", parts, error)
            if error.memory is None:
                continue
            least = min(least, (error.memory.total, f"{error.memory} with accumulation={parts}"))
            if error.memory.arguments > budget_gib * GIB:
                # They are the same for every micro-batch, so the search ends.
                raise ConfigError(
                    OPTION,
                    f"{budget_gib:g} GiB is not enough: state and batch alone take "
                    f"{error.memory.arguments / GIB:.4g} GiB on each device, whatever the "
                    "accumulation. Raise the budget, or lower the model's size, take an optimiser "
                    "with a smaller state, or share parameters over more devices (mesh.fsdp).",
                ) from None
            continue
        logging.info(
            "accumulation=%d: the step takes %s on a device, of %s=%g",
            parts,
            step.memory,
            OPTION,
            budget_gib,
        )
        return parts, step
    raise ConfigError(
        OPTION,
        f"{budget_gib:g} GiB is not enough: the step takes at least {least[1]} on each device. "
        "Raise the budget, or lower the length of what is trained on (data.sequence_length), "
        "model.recurrence.backprop_depth or the model's size, set model.remat='full', or share "
        "parameters over more devices (mesh.fsdp).",
    )


class _DoesNotFit(Exception):
    """`memory` is None where the compiler gave up and did not say how much it needed."""

    def __init__(self, memory: StepMemory | None):
        self.memory = memory
        super().__init__("more than there is" if memory is None else str(memory))


def _compile_all(
    compile_for: Callable[[int, Any], StepProgram],
    parts: int,
    batches: Sequence[Any],
    budget_gib: float,
) -> CompiledStep:
    programs, memories = {}, []
    # The longest rows, which take most, come first, so that most attempts fail at once.
    for batch in reversed(batches):
        shape = shape_of(batch)
        try:
            programs[shape] = compile_for(parts, batch)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            raise _DoesNotFit(None) from error
        memories.append(step_memory(programs[shape]))
        if memories[-1].total > budget_gib * GIB:
            raise _DoesNotFit(memories[-1])
    return CompiledStep(programs, max(memories, key=lambda memory: memory.total))


def step_memory(compiled: StepProgram) -> StepMemory:
    """What the compiler says about a program's memory on one device.

    Raises:
      ConfigError: if it says nothing on this kind of device.
    """
    analysis = compiled.memory_analysis()
    if analysis is None:
        raise ConfigError(
            OPTION,
            f"the compiler for {jax.default_backend()!r} does not tell how much memory a program "
            "takes; leave it None and set train.accumulation.",
        )
    return StepMemory(
        arguments=analysis.argument_size_in_bytes,
        outputs=analysis.output_size_in_bytes - analysis.alias_size_in_bytes,
        temporaries=analysis.temp_size_in_bytes,
    )
