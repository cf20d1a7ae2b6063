"""The course of a program: which operations run, how often, and what they cost together.

A loop runs its body as often as the compiler found, or as the caller says where the number of turns
depends on data. Of the branches of a conditional the one that takes longest counts.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from megatransformer_jax.compiled.chips import Chip
from megatransformer_jax.compiled.collectives import collective_kind
from megatransformer_jax.compiled.hlo import Computation, Module, Op
from megatransformer_jax.compiled.work import (
    hbm_bytes,
    is_kernel,
    kernel_flops,
    product_flops,
)


class Cost(NamedTuple):
    """Of operations that run once, one after the other, on one device.

    Attributes:
      flops: of matrix products and kernels.
      flops_once: the same with every loop run once.
      hbm_bytes: read from and written to main memory, without exchanges.
      compute_s: of operations that computing bounds.
      memory_s: of the others.
    """

    flops: float = 0.0
    flops_once: float = 0.0
    hbm_bytes: float = 0.0
    compute_s: float = 0.0
    memory_s: float = 0.0

    def plus(self, other: "Cost", times: int = 1) -> "Cost":
        """Followed by another, as often as a loop says."""
        return Cost(
            self.flops + times * other.flops,
            self.flops_once + other.flops_once,
            self.hbm_bytes + times * other.hbm_bytes,
            self.compute_s + times * other.compute_s,
            self.memory_s + times * other.memory_s,
        )


class Visit(NamedTuple):
    """An operation in the course of the program.

    Attributes:
      op: the operation; those inside fusions are visited too.
      loop: the `while` around it, if any.
      times: that it runs in one call.
      is_fused: it stands in a fusion.
    """

    op: Op
    loop: Op | None
    times: int
    is_fused: bool


@dataclasses.dataclass(frozen=True)
class Course:
    """What `read_program` asks of a program that runs on one chip.

    Attributes:
      module: the program.
      chip: that it runs on.
      traced_trips: turns of loops, by a part of their source; or one number for all.
    """

    module: Module
    chip: Chip
    traced_trips: Mapping[str, int] | int
    _costs: dict[str, Cost] = dataclasses.field(default_factory=dict)

    def trips(self, loop: Op) -> tuple[int, str]:
        """Turns of a `while`, and whether they are known, given or assumed."""
        known = self.module.trips(loop)
        if known is not None:
            return known, "known"
        if isinstance(self.traced_trips, int):
            return self.traced_trips, "given"
        for part, trips in self.traced_trips.items():
            if part in loop.source:
                return trips, "given"
        return 1, "assumed"

    def cost(self, computation: Computation) -> Cost:
        """Of one run of a computation."""
        if computation.name not in self._costs:
            total = Cost()
            for op in computation.ops.values():
                total = total.plus(*self._cost_of(op))
            self._costs[computation.name] = total
        return self._costs[computation.name]

    def _cost_of(self, op: Op) -> tuple[Cost, int]:
        if op.opcode == "while":
            return self.cost(self.module.body(op)), self.trips(op)[0]
        if op.opcode == "conditional":
            return self.cost(self.branch(op)), 1
        if op.opcode in ("call", "async-start"):
            return self.cost(self.module.called(op)[0]), 1
        flops = self.flops(op)
        moved = 0.0 if self._is_exchange(op) else hbm_bytes(self.module, op)
        computing, moving = flops / self.chip.bf16_flops, moved / self.chip.hbm_bandwidth
        is_computing = computing >= moving
        return (
            Cost(flops, flops, moved, computing * is_computing, moving * (not is_computing)),
            1,
        )

    def seconds(self, op: Op) -> float:
        """That one run of an operation takes at least, without exchanges."""
        cost, times = self._cost_of(op)
        return times * (cost.compute_s + cost.memory_s)

    def flops(self, op: Op) -> float:
        """Of one run of an operation, with what is fused into it."""
        if is_kernel(op):
            return kernel_flops(self.module, op)
        if op.opcode != "fusion":
            return product_flops(self.module.computations[op.computation], op)
        return sum(self.flops(inner) for inner in self.module.called(op)[0].ops.values())

    def branch(self, op: Op) -> Computation:
        """Of a `conditional`, the branch that takes longest."""

        def seconds(computation: Computation) -> float:
            cost = self.cost(computation)
            return cost.compute_s + cost.memory_s

        return max(self.module.called(op), key=seconds)

    def _is_exchange(self, op: Op) -> bool:
        """A collective, alone or in a fusion that computes nothing else."""
        if collective_kind(op) is not None:
            return True
        if op.opcode != "fusion" or self.flops(op):
            return False
        inner = self.module.called(op)[0].ops.values()
        return any(collective_kind(other) is not None for other in inner) and not any(
            other.opcode in ("fusion", "reduce") for other in inner
        )

    def visits(self) -> Iterator[Visit]:
        """Every operation that runs, in the order of the program."""
        yield from self._visits(self.module.main, None, 1, False)

    def _visits(
        self, computation: Computation, loop: Op | None, times: int, is_fused: bool
    ) -> Iterator[Visit]:
        for op in computation.ops.values():
            yield Visit(op, loop, times, is_fused)
            if op.opcode == "while":
                yield from self._visits(self.module.body(op), op, times * self.trips(op)[0], False)
            elif op.opcode == "conditional":
                yield from self._visits(self.branch(op), loop, times, False)
            elif op.opcode in ("call", "async-start", "fusion"):
                inner = self.module.called(op)[0]
                yield from self._visits(inner, loop, times, is_fused or op.opcode == "fusion")
