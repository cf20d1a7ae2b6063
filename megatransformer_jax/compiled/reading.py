"""What a compiled program does, as plain values: what `read_program` returns.

All amounts are those of one device and one call of the program. A call of the train step is a step
of the optimiser; a call of a decode program makes as many tokens as it was compiled for.
"""

import dataclasses
from typing import Any

from megatransformer_jax.compiled.chips import Chip


@dataclasses.dataclass(frozen=True)
class Loop:
    """A loop of the program.

    Attributes:
      name: of its body's computation.
      source: where it was written, as the path of names in the program's metadata.
      trips: turns each time the loop is entered.
      trips_are: 'known', as the compiler found; 'given', by the caller of `read_program`; or
        'assumed' to be 1, because the number of turns depends on data and nobody gave it.
      parent: the loop that it stands in; None outside of loops.
      turns: all turns in one call: trips, times the turns of the loops around it.
      flops: of one turn, with the loops inside.
      hbm_bytes: read and written in one turn, with the loops inside.
    """

    name: str
    source: str
    trips: int
    trips_are: str
    parent: str | None
    turns: int
    flops: float
    hbm_bytes: float


@dataclasses.dataclass(frozen=True)
class Collective:
    """An exchange between devices.

    Attributes:
      name: of the operation.
      kind: 'all-gather', 'all-reduce', 'reduce-scatter', 'all-to-all', 'collective-permute', or
        'send' to another slice. What the compiler writes as an all-reduce whose result is cut at
        once is a reduce-scatter.
      axes: of the mesh, over which its groups lie; empty if they follow no axis.
      group_size: devices that exchange with each other.
      dtype: what is sent, as HLO names it: 'bf16', 'f32'.
      shape: of the largest array of it, whole: the result of a gather, the operand of a reduction.
      logical_bytes: of the whole arrays, each time.
      wire_bytes: that a device sends each time, by the best algorithm on a ring.
      loop: the loop that it stands in; None outside of loops.
      times: in one call.
      is_async: computation can go on meanwhile.
      source: where it was written.
      is_between_slices: it goes over the data centre's network, to other slices or machines.
      seconds: that it takes each time, at the rate of its links.
      hidden_s: of these, those in which other operations run.
    """

    name: str
    kind: str
    axes: tuple[str, ...]
    group_size: int
    dtype: str
    shape: tuple[int, ...]
    logical_bytes: int
    wire_bytes: float
    loop: str | None
    times: int
    is_async: bool
    source: str
    is_between_slices: bool
    seconds: float = 0.0
    hidden_s: float = 0.0

    @property
    def total_wire_bytes(self) -> float:
        """That a device sends in one call."""
        return self.times * self.wire_bytes


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A kernel that was written by hand, such as splash attention.

    Attributes:
      name: of the kernel.
      loop: the loop that it stands in; None outside of loops.
      times: in one call.
      flops: each time; 0 for a kernel whose work is not known.
      source: where it was written.
    """

    name: str
    loop: str | None
    times: int
    flops: float
    source: str


@dataclasses.dataclass(frozen=True)
class Copy:
    """An array that is written to main memory a second time.

    Attributes:
      name: of the operation.
      kind: 'copy', in another layout or place, or 'conversion', in another type.
      shape: of the array as HLO writes it, with its layout.
      num_bytes: of the result, each time, padded to whole tiles.
      of: the argument that is copied, or that the result is written to; empty for what the program
        made itself.
      loop: the loop that it stands in; None outside of loops.
      times: in one call.
      source: where it was written.
    """

    name: str
    kind: str
    shape: str
    num_bytes: int
    of: str
    loop: str | None
    times: int
    source: str


@dataclasses.dataclass(frozen=True)
class Buffer:
    """An array of the program that takes memory at its fullest moment.

    Attributes:
      name: of the operation that makes it.
      shape: as HLO writes it, with its layout.
      num_bytes: padded to whole tiles.
      source: where it was written, or what it is made of.
    """

    name: str
    shape: str
    num_bytes: int
    source: str


@dataclasses.dataclass(frozen=True)
class Flag:
    """Something that a program should not do.

    Attributes:
      kind: one of `FLAGS` in `flags.py`.
      text: a sentence for the reader: what, how much, where.
      num_bytes: of all operations together, in one call.
      names: of the operations.
    """

    kind: str
    text: str
    num_bytes: float
    names: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Estimate:
    """How long one call takes at least, and if nothing overlaps.

    None is a measurement. The floor cannot be beaten. Without overlap operations are added up one
    by one, each as the longer of FLOPs over peak and bytes over bandwidth, and then the
    collectives; with it, the time of collectives in which the schedule has other operations is left
    out. Both ignore how well a shape fills the matrix unit and the gaps between operations.

    Attributes:
      floor_s: all FLOPs, all bytes or the exchanges over one axis at the chip's peak rates,
        whichever takes longest.
      compute_s: of the operations that computing bounds.
      memory_s: of the operations that memory bounds.
      exchange_s: of the collectives, on one axis of the torus or between slices.
      hidden_s: of these seconds, those in which other operations run.
    """

    floor_s: float
    compute_s: float
    memory_s: float
    exchange_s: float
    hidden_s: float = 0.0

    @property
    def no_overlap_s(self) -> float:
        """One after the other."""
        return self.compute_s + self.memory_s + self.exchange_s

    @property
    def scheduled_s(self) -> float:
        """With exchanges next to computation, as far as the schedule has it so."""
        return self.no_overlap_s - self.hidden_s

    def utilisation(self, useful_flops: float, chip: Chip) -> float:
        """Share of the chip's peak rate that is put to use without overlap (MFU).

        Args:
          useful_flops: that the mathematics of one call needs on one device, without what is
            computed again.
          chip: that the estimate was made for.
        """
        return useful_flops / chip.bf16_flops / self.no_overlap_s


@dataclasses.dataclass(frozen=True)
class ProgramReading:
    """A compiled program, read.

    Attributes:
      chip: that the estimate is for.
      mesh: devices on each axis.
      flops: of matrix products and kernels, each as often as it runs.
      flops_once: the same with each loop run once, as XLA's own count has it.
      hbm_bytes: read from and written to the chip's memory.
      estimate: of the time.
      loops: outer before inner, in the order of the program.
      collectives: in the order of the program.
      kernels: in the order of the program.
      copies: of at least 1 MiB, most bytes in one call first.
      buffers: the ten largest at the fullest moment, largest first.
      live_bytes: of all temporary arrays at that moment, as the schedule has them. The compiler's
        own number is in `memory_analysis()`.
      flags: what should be otherwise, most bytes first.
    """

    chip: Chip
    mesh: dict[str, int]
    flops: float
    flops_once: float
    hbm_bytes: float
    estimate: Estimate
    loops: tuple[Loop, ...]
    collectives: tuple[Collective, ...]
    kernels: tuple[Kernel, ...]
    copies: tuple[Copy, ...]
    buffers: tuple[Buffer, ...]
    live_bytes: int
    flags: tuple[Flag, ...]

    @property
    def kernel_flops(self) -> float:
        """The part of `flops` that kernels do. XLA's own count leaves it out."""
        return sum(kernel.times * kernel.flops for kernel in self.kernels)

    @property
    def hbm_bytes_outside_loops(self) -> float:
        """What a call moves besides its loops: of a decode program, besides its tokens."""
        inside = sum(loop.turns * loop.hbm_bytes for loop in self.loops if loop.parent is None)
        return self.hbm_bytes - inside

    @property
    def wire_bytes(self) -> float:
        """That one device sends in one call, over all networks."""
        return sum(collective.total_wire_bytes for collective in self.collectives)

    def loop(self, name: str) -> Loop:
        """By the name of its body.

        Raises:
          KeyError: if there is none.
        """
        for loop in self.loops:
            if loop.name == name:
                return loop
        raise KeyError(name)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        values = dataclasses.asdict(self)
        values["estimate"]["no_overlap_s"] = self.estimate.no_overlap_s
        values["estimate"]["scheduled_s"] = self.estimate.scheduled_s
        return values | {
            "kernel_flops": self.kernel_flops,
            "hbm_bytes_outside_loops": self.hbm_bytes_outside_loops,
            "wire_bytes": self.wire_bytes,
        }
