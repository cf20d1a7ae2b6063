"""Tries meshes, rematerialisation and micro-batches for TPUs or GPUs, and ranks those that fit.

Each trial is a compiled train step. What `inspect` expects to be far too large is not compiled, nor
what cannot be faster than something on the same mesh that fits already.
"""

import dataclasses
import itertools
import math
import time
from collections.abc import Iterator, Sequence
from typing import Any

from rich.table import Table

from megatransformer_jax.compiled.chips import chip_of
from megatransformer_jax.config.compiling import CompileConfig
from megatransformer_jax.config.option import ConfigError
from megatransformer_jax.config.run import RunConfig
from megatransformer_jax.config.run_base import BaseRunConfig
from megatransformer_jax.config.run_kinds import require_transformer
from megatransformer_jax.runs.compile import CompileReport, Progress, compile_for_topology
from megatransformer_jax.runs.cost import format_bytes, format_number, make_report
from megatransformer_jax.sharding.devices import DEVICE_NAMES
from megatransformer_jax.sharding.mesh import check_run_fits_mesh, make_mesh
from megatransformer_jax.sharding.rules import MESH_AXES
from megatransformer_jax.sharding.topology import describe_devices, parse_topology

# From what takes the least time to what keeps least on the chip.
REMATS = ("none", "dots", "full", "offload")
# Micro-batches that are tried, at most.
MAX_ACCUMULATION = 16
# A step whose memory is expected to be so many times the chip's is not compiled.
_HOPELESS = 1.5


@dataclasses.dataclass(frozen=True)
class Candidate:
    """What a trial changes in a run.

    Attributes:
      mesh: devices on each axis, in the order of `MESH_AXES`.
      remat: `model.remat`.
      accumulation: `train.accumulation`.
    """

    mesh: tuple[int, ...]
    remat: str
    accumulation: int

    @property
    def cost(self) -> tuple[int, ...]:
        """What is cheap to compile comes first: few exchanges, one micro-batch, no recomputing."""
        _, fsdp, tensor, sequence = self.mesh
        exchanges = (tensor > 1) + 2 * (sequence > 1)
        return exchanges, self.accumulation, REMATS.index(self.remat), tensor * sequence, fsdp

    def is_no_faster_than(self, other: "Candidate") -> bool:
        """Whether it does at least as much work on the same mesh."""
        return (
            self.mesh == other.mesh
            and self.accumulation >= other.accumulation
            and REMATS.index(self.remat) >= REMATS.index(other.remat)
        )

    def options(self) -> str:
        """As on the command line."""
        sizes = zip(MESH_AXES, self.mesh, strict=True)
        parts = [f"--config.mesh.{axis}={size}" for axis, size in sizes if size > 1]
        parts.append(f"--config.model.remat={self.remat}")
        if self.accumulation > 1:
            parts.append(f"--config.train.accumulation={self.accumulation}")
        return " ".join(parts)

    def applied_to(self, config: RunConfig) -> RunConfig:
        """The run with it.

        Raises:
          ConfigError: if it does not suit the run.
        """
        sizes = dict(zip(MESH_AXES, self.mesh, strict=True))
        return dataclasses.replace(
            config,
            mesh=dataclasses.replace(config.mesh, **sizes),
            model=dataclasses.replace(config.model, remat=self.remat),
            train=dataclasses.replace(
                config.train, accumulation=self.accumulation, memory_budget_gib=None
            ),
        )


@dataclasses.dataclass(frozen=True)
class Trial:
    """A candidate that was compiled."""

    candidate: Candidate
    report: CompileReport

    @property
    def no_overlap_s(self) -> float:
        """Of a step at the mean depth; infinite if it does not fit."""
        return self.report.speeds[0].no_overlap_s if self.report.fits else math.inf

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return dataclasses.asdict(self.candidate) | self.report.to_dict()


@dataclasses.dataclass(frozen=True)
class Search:
    """What was tried.

    Attributes:
      trials: slowest first, what does not fit before; so the best is the last.
      hopeless: candidates that were expected to be far too large.
      left: candidates for which there was no time.
    """

    trials: tuple[Trial, ...]
    hopeless: int
    left: int

    @property
    def fits(self) -> bool:
        """Whether anything does."""
        return any(trial.report.fits for trial in self.trials)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        trials = [trial.to_dict() for trial in self.trials]
        return {"hopeless": self.hopeless, "left": self.left, "trials": trials}


def search(
    run: BaseRunConfig,
    compiling: CompileConfig,
    budget_s: float,
    progress: Progress = lambda doing: None,
) -> Search:
    """Compiles candidates, cheap ones first, until all are done or the time is over.

    Args:
      run: whose mesh, remat and accumulation are replaced.
      compiling: for which slices.
      budget_s: seconds after which no other trial begins; there is at least one.
      progress: told what is being done.

    Raises:
      ConfigError: if no mesh suits the run.
      UserError: if libtpu or JAX's CUDA plugin is missing.
    """
    config, ends = require_transformer(run), time.monotonic() + budget_s
    assert compiling.topology is not None  # A rule says so.
    topology = parse_topology(compiling.topology, compiling.slices)
    devices = describe_devices(topology)
    waiting = sorted(_candidates(config, devices), key=lambda candidate: candidate.cost)
    if not waiting:
        raise ConfigError(
            "mesh",
            f"no mesh over the {len(devices)} chips of {topology} suits this run; change "
            f"data.batch_size={config.data.batch_size} or model.width={config.model.width}.",
        )
    limit = _HOPELESS * chip_of(topology).hbm_bytes
    trials: list[Trial] = []
    hopeless = 0
    while waiting and (not trials or time.monotonic() < ends):
        candidate = waiting.pop(0)
        fitting = [trial.candidate for trial in trials if trial.report.fits]
        if any(candidate.is_no_faster_than(other) for other in fitting):
            continue
        tried = candidate.applied_to(config)
        if _expected_bytes(tried, topology.kind) > limit:
            hopeless += 1
            continue
        label = f"trial {len(trials) + 1}, {candidate.options()}: "

        def tell(doing: str, label: str = label) -> None:
            progress(label + doing)

        trials.append(Trial(candidate, compile_for_topology(tried, compiling, tell)))
    ranked = sorted(trials, key=lambda trial: -trial.no_overlap_s)
    return Search(tuple(ranked), hopeless, len(waiting))


def _candidates(config: RunConfig, devices: Sequence[Any]) -> Iterator[Candidate]:
    parts = range(1, min(MAX_ACCUMULATION, config.data.batch_size) + 1)
    accumulations = [count for count in parts if config.data.batch_size % count == 0]
    for sizes in _factorisations(len(devices), len(MESH_AXES)):
        plain = Candidate(sizes, REMATS[0], 1)
        try:
            mesh = make_mesh(plain.applied_to(config).mesh, devices)
        except ConfigError:
            continue
        for accumulation, remat in itertools.product(accumulations, REMATS):
            candidate = Candidate(sizes, remat, accumulation)
            try:
                check_run_fits_mesh(candidate.applied_to(config), mesh)
            except ConfigError:
                continue
            yield candidate


def _factorisations(product: int, count: int) -> Iterator[tuple[int, ...]]:
    if count == 1:
        yield (product,)
        return
    for first in range(1, product + 1):
        if product % first == 0:
            for rest in _factorisations(product // first, count - 1):
                yield first, *rest


def _expected_bytes(config: RunConfig, kind: str) -> int:
    """As `inspect` expects it; 0 where it knows no such device."""
    return make_report(config, kind).memory.total if kind in DEVICE_NAMES else 0


def search_table(found: Search, chips: int) -> Table:
    """The trials, the best last and marked."""
    headings = ("options", "step", "exchanges", "tokens/s", "per chip", "memory", "compiled in")
    table = Table(title="Train steps that were compiled, the best last")
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "options" else "right")
    for number, trial in enumerate(found.trials, 1):
        is_best = number == len(found.trials) and trial.report.fits
        table.add_row(trial.candidate.options() + " <" * is_best, *_cells(trial, chips))
    table.title_justify = table.caption_justify = "left"
    table.caption = (
        "By the time of a step in which nothing overlaps, estimated at the mean depth. "
        f"{found.hopeless} candidates were expected to be far too large and not compiled"
    )
    if found.left:
        table.caption += f"; for {found.left} there was no time (--budget)"
    table.caption += "."
    return table


def _cells(trial: Trial, chips: int) -> Iterator[str]:
    program = trial.report.programs[0]
    taken = f"{program.lower_s + program.compile_s:.0f} s"
    if program.memory is None or not program.fits:
        yield from ("does not fit", "", "", "", "", taken)
        return
    speed = trial.report.speeds[0]
    yield f"{1e3 * speed.no_overlap_s:.4g} ms"
    yield f"{format_bytes(program.reading.wire_bytes)}"
    yield format_number(speed.tokens_per_s)
    yield format_number(speed.tokens_per_s / chips)
    yield format_bytes(program.memory.total)
    yield taken
