"""Chooses the size of the micro-batch by the memory that the compiled step says it takes.

The step is compiled ahead of time for smaller and smaller micro-batches until it fits, and the
program that fits is the one that trains: nothing is compiled twice and nothing is allocated to find
out.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from absl import logging

from megatransformer_jax.config.option import ConfigError
from megatransformer_jax.sharding.rules import Sharder
from megatransformer_jax.training.state import TrainState
from megatransformer_jax.training.step import Metrics, TrainStep
from megatransformer_jax.types import Batch

GIB = 2**30
OPTION = "train.memory_budget_gib"
Shape = tuple[int, int]  # rows and length of a batch, [B, T]


@runtime_checkable
class StepProgram(Protocol):
    """A train step compiled for one shape of batch (`jax.stages.Compiled`)."""

    def __call__(self, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
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
      programs: compiled, by rows and length of the batch.
      memory: of the one that takes the most.
    """

    def __init__(self, programs: Mapping[Shape, StepProgram], memory: StepMemory):
        self._programs = dict(programs)
        self.memory = memory

    def __call__(self, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        """Runs the program of the batch's shape; the state is donated."""
        return self._programs[batch.tokens.shape](state, batch)


def possible_accumulations(batch_size: int, batch_ways: int) -> list[int]:
    """Divisors of the batch whose micro-batches can be cut for the devices, ascending.

    Args:
      batch_size: rows of the batch.
      batch_ways: devices over which rows are cut (mesh axes data x fsdp).
    """
    divisors = [parts for parts in range(1, batch_size + 1) if batch_size % parts == 0]
    return [parts for parts in divisors if batch_size // parts % batch_ways == 0]


def compile_step(
    train_step: TrainStep, state: TrainState, shape: Shape, sharder: Sharder
) -> StepProgram:
    """Compiles a step that overwrites its state, from shapes alone.

    Args:
      train_step: not yet jitted.
      state: ShapeDtypeStructs with shardings; the new state gets the same.
      shape: rows and length of the batch.
      sharder: places the batch.
    """
    sharding = sharder.sharding("batch", "length")

    def array(dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    whole = array(jnp.int32)
    batch = Batch(whole, whole, array(jnp.float32), whole, whole)
    out_shardings = (jax.tree.map(lambda leaf: leaf.sharding, state), None)
    step = jax.jit(train_step, donate_argnums=0, out_shardings=out_shardings)
    return step.lower(state, batch).compile()


def choose_accumulation(
    compile_for: Callable[[int, Shape], StepProgram],
    accumulations: Sequence[int],
    shapes: Sequence[Shape],
    budget_gib: float,
) -> tuple[int, CompiledStep]:
    """The smallest accumulation whose step fits the budget on every device, and that step.

    Candidates are tried in their order, because memory need not fall from one to the next: more
    than one micro-batch also needs a sum of gradients.

    Args:
      compile_for: compiles the step with this accumulation for a shape of batch.
      accumulations: candidates, ascending.
      shapes: of all batches; the step must fit with each of them.
      budget_gib: what one device may use for the step.

    Raises:
      ConfigError: if no candidate fits, naming the least that is needed (or, where they alone
        are too much, what state and batch take) and what lowers it.
    """
    least: tuple[float, str] = (float("inf"), "more memory than the device has")
    for parts in accumulations:
        try:
            step = _compile_all(compile_for, parts, shapes, budget_gib)
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
        "Raise the budget, or lower data.sequence_length, model.recurrence.backprop_depth or the "
        "model's size, set model.remat='full', or share parameters over more devices (mesh.fsdp).",
    )


class _DoesNotFit(Exception):
    """`memory` is None where the compiler gave up and did not say how much it needed."""

    def __init__(self, memory: StepMemory | None):
        self.memory = memory
        super().__init__("more than there is" if memory is None else str(memory))


def _compile_all(
    compile_for: Callable[[int, Shape], StepProgram],
    parts: int,
    shapes: Sequence[Shape],
    budget_gib: float,
) -> CompiledStep:
    programs, memories = {}, []
    # The longest rows, which take most, come first, so that most attempts fail at once.
    for shape in reversed(shapes):
        try:
            programs[shape] = compile_for(parts, shape)
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
