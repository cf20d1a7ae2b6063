"""The one entry to this folder: `read_program`."""

import dataclasses
import re
from collections.abc import Iterable, Mapping

from megatransformer_jax.compiled.buffers import NUM_SHOWN, fullest_moment
from megatransformer_jax.compiled.chips import Chip
from megatransformer_jax.compiled.collectives import (
    collective_kind,
    read_collective,
    repeated_pieces,
    slice_mesh,
)
from megatransformer_jax.compiled.course import Cost, Course, Visit
from megatransformer_jax.compiled.flags import Exchange, find_copies, find_flags
from megatransformer_jax.compiled.hlo import Module, parse_hlo
from megatransformer_jax.compiled.overlap import hidden_seconds
from megatransformer_jax.compiled.reading import Collective, Estimate, Kernel, Loop, ProgramReading
from megatransformer_jax.compiled.work import is_kernel
from megatransformer_jax.config.option import UserError


def read_program(
    program: str | Module,
    mesh: Mapping[str, int],
    chip: Chip,
    *,
    traced_trips: Mapping[str, int] | int = 1,
) -> ProgramReading:
    """Reads what a compiled program does on one device.

    Args:
      program: `compiled.as_text()`, scheduled HLO after partitioning; or what `parse_hlo` made of
        it, to read it several times, for several depths.
      mesh: devices on each axis, in the order of `Mesh.shape`; those of all slices.
      chip: that it was compiled for.
      traced_trips: turns of loops whose number of turns depends on data: by a part of the loop's
        `source`, such as {"_iterate_core": 4}, the first that fits; or one number for all of them.
        Others count once.

    Raises:
      UserError: if the text is not scheduled HLO, if the mesh does not have the program's devices,
        or if a number of turns is negative.
    """
    given = [traced_trips] if isinstance(traced_trips, int) else traced_trips.values()
    if any(trips < 0 for trips in given):
        raise UserError(f"traced_trips: {traced_trips!r} has a negative number of turns.")
    module = parse_hlo(program) if isinstance(program, str) else program
    own_mesh = slice_mesh(mesh, _num_devices(module))
    course = Course(module, chip, traced_trips)
    visits = list(course.visits())
    repeated = repeated_pieces(module)
    exchanges = [
        Exchange(
            visit.op,
            read_collective(module, visit.op, own_mesh, chip.linked, *_where(module, visit)),
            in_loop=visit.loop is not None and visit.loop.source.endswith("while"),
        )
        for visit in visits
        if collective_kind(visit.op) is not None and visit.op.name not in repeated
    ]
    collectives = _timed(course, [exchange.collective for exchange in exchanges])
    cost, moment = course.cost(module.main), fullest_moment(course)
    copies = find_copies(course, visits)
    return ProgramReading(
        chip=chip,
        mesh=dict(mesh),
        flops=cost.flops,
        flops_once=cost.flops_once,
        hbm_bytes=cost.hbm_bytes,
        estimate=Estimate(
            floor_s=_floor(cost, collectives, chip),
            compute_s=cost.compute_s,
            memory_s=cost.memory_s,
            exchange_s=sum(item.total_wire_bytes / _rate(item, chip) for item in collectives),
            hidden_s=sum(item.times * item.hidden_s for item in collectives),
        ),
        loops=tuple(_loop(course, visit) for visit in visits if visit.op.opcode == "while"),
        collectives=collectives,
        kernels=tuple(_kernel(course, visit) for visit in visits if is_kernel(visit.op)),
        copies=tuple(copies),
        buffers=moment.buffers[:NUM_SHOWN],
        live_bytes=moment.num_bytes,
        flags=find_flags(course, exchanges, copies),
    )


def _num_devices(module: Module) -> int:
    found = re.search(r"\bnum_partitions=(\d+)", module.header)
    return int(found.group(1)) if found else 1


def _where(module: Module, visit: Visit) -> tuple[str | None, int]:
    return None if visit.loop is None else module.body(visit.loop).name, visit.times


def _timed(course: Course, collectives: Iterable[Collective]) -> tuple[Collective, ...]:
    """The same with the seconds that they take, and those that other operations hide."""
    seconds = {item.name: item.wire_bytes / _rate(item, course.chip) for item in collectives}
    hidden = hidden_seconds(course, seconds)
    return tuple(
        dataclasses.replace(item, seconds=seconds[item.name], hidden_s=hidden.get(item.name, 0.0))
        for item in collectives
    )


def _rate(collective: Collective, chip: Chip) -> float:
    """Bytes per second of the links that an exchange goes over."""
    return chip.dcn_bandwidth if collective.is_between_slices else chip.ici_bandwidth


def _floor(cost: Cost, collectives: tuple[Collective, ...], chip: Chip) -> float:
    """The busiest of matrix unit, memory and networks, which at best all work at once."""
    networks: dict[tuple[str, ...] | None, float] = {}
    for collective in collectives:
        network = None if collective.is_between_slices else collective.axes
        seconds = collective.times * collective.seconds
        networks[network] = networks.get(network, 0.0) + seconds
    computing, moving = cost.flops / chip.bf16_flops, cost.hbm_bytes / chip.hbm_bandwidth
    return max(computing, moving, *networks.values())


def _loop(course: Course, visit: Visit) -> Loop:
    body = course.module.body(visit.op)
    trips, trips_are = course.trips(visit.op)
    cost = course.cost(body)
    parent, times = _where(course.module, visit)
    return Loop(
        name=body.name,
        source=visit.op.source,
        trips=trips,
        trips_are=trips_are,
        parent=parent,
        turns=times * trips,
        flops=cost.flops,
        hbm_bytes=cost.hbm_bytes,
    )


def _kernel(course: Course, visit: Visit) -> Kernel:
    loop, times = _where(course.module, visit)
    return Kernel(
        name=re.sub(r"\.\d+$", "", visit.op.name),
        loop=loop,
        times=times,
        flops=course.flops(visit.op),
        source=visit.op.source,
    )
