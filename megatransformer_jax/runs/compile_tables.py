"""Tables of what compiled programs say, for a terminal, a file or a notebook."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from megatransformer_jax.compiled.reading import Collective, ProgramReading
from megatransformer_jax.models.attention_kernels import describe_choices
from megatransformer_jax.runs.compile import CompiledProgram, CompileReport, Speed
from megatransformer_jax.runs.cost import format_bytes, format_number

_SECONDS_PER_DAY = 86_400
# Loops that move less, and arrays that take a smaller share of the largest, are left out.
_NEGLIGIBLE, _FEW = 2**20, 0.01
# A path of names is cut in front to this length.
_PATH_WIDTH = 48


def compile_tables(report: CompileReport) -> list[Table]:
    """What was compiled, memory, speed, and for each program loops, exchanges, buffers, flags."""
    found = [_target(report), _memory(report)]
    if report.speeds:
        found.append(_speeds(report))
    for program in report.programs:
        if program.fits:
            found += _tables_of(program)
    for table in found:
        table.title_justify = table.caption_justify = "left"
    return found


def compile_rows(report: CompileReport) -> list[dict[str, Any]]:
    """A row per program, with what tables and comparisons need most; None if it does not fit."""
    rows = []
    for program in report.programs:
        row: dict[str, Any] = {"program": program.name, "fits": program.fits}
        row |= dict.fromkeys(("bytes", "floor_s", "no_overlap_s", "flops", "wire_bytes", "flags"))
        if program.memory is not None and program.fits:
            reading = program.reading
            row |= {
                "bytes": program.memory.total,
                "floor_s": reading.estimate.floor_s,
                "no_overlap_s": reading.estimate.no_overlap_s,
                "flops": reading.flops,
                "wire_bytes": reading.wire_bytes,
                "flags": [flag.kind for flag in reading.flags],
            }
        rows.append(row)
    return rows


def print_compiled(console: Console, tables: Iterable[Table]) -> None:
    """Prints them; in plain characters where the console is not a terminal."""
    for table in tables:
        table.box = box.ROUNDED if console.is_terminal else box.ASCII
        console.print(table)


def _tables_of(program: CompiledProgram) -> list[Table]:
    reading, name = program.reading, program.name
    tables = [_flags(reading, name)]
    if reading.loops:
        tables.append(_loops(reading, name))
    if reading.collectives:
        tables.append(_exchanges(reading, name))
    if reading.copies:
        tables.append(_copies(reading, name))
    if reading.buffers:
        tables.append(_buffers(reading, name))
    return tables


# ------------------------------------------------------------------------------
# The whole.


def _target(report: CompileReport) -> Table:
    table = _table(f"{report.compiling.phase} on {report.topology}", ["what", "value"])
    kind, chips = report.device_kind, report.topology.chips
    room = "HBM" if report.topology.gpu is None else "for JAX"
    table.add_row("devices", f"{chips} x {kind}, {format_bytes(report.chip.hbm_bytes)} {room} each")
    if report.mesh:
        sizes = " x ".join(f"{axis} {size}" for axis, size in report.mesh.items())
        table.add_row("mesh", sizes + (f" ({report.layout})" if report.layout else ""))
    else:
        table.add_row("mesh", f"none: the programs run on one of the {chips} devices")
    table.add_row("rows", str(report.rows))
    if report.attention:
        table.add_row("attention", describe_choices(report.attention))
    else:
        table.add_row("attention", "xla, in blocks of the cache, which no fused kernel reads")
    if report.cache_bytes:
        table.add_row("cache per device", format_bytes(report.cache_bytes))
    if report.headroom is not None:
        table.add_row("headroom", _headroom(report))
    versions = ", ".join(f"{name} {version}" for name, version in report.versions.items())
    table.add_row("compiled by", versions)
    for name, value in report.flags.items():
        table.add_row(name, value)
    return table


def _headroom(report: CompileReport) -> str:
    room = report.headroom
    assert room is not None
    text = f"{room.most} rows fit"
    if room.too_many is not None:
        return f"{text}, {room.too_many} do not"
    if room.estimate is not None and room.estimate > room.most:
        text += f"; about {room.estimate} would"
    return text


def _memory(report: CompileReport) -> Table:
    headings = ["program", "arguments", "results", "temporaries", "all", "fits", "compiled in"]
    table = _table("Memory per device", headings)
    problems = []
    for program in report.programs:
        memory, taken = program.memory, f"{program.lower_s + program.compile_s:.1f} s"
        parts = [""] * 4
        if memory is not None:
            sizes = (memory.arguments, memory.outputs, memory.temporaries, memory.total)
            parts = list(map(format_bytes, sizes))
        table.add_row(program.name, *parts, "yes" if program.fits else "no", taken)
        if not program.fits:
            problems.append(f"{program.name}: {program.problem}")
    counted = "As the compiler counts them; the results leave out arguments that are overwritten."
    if report.topology.kind == "v4":
        counted += " Temporaries include the 128 MiB of CMEM, which is not a part of HBM."
    table.caption = " ".join(problems) or counted
    return table


def _speeds(report: CompileReport) -> Table:
    headings = ["depth", "at least", "no overlap", "MFU", "tokens/s", "per chip", "tokens/day"]
    table = _table("Time of a call, estimated", headings)
    chips = math.prod(report.mesh.values())
    for index, speed in enumerate(report.speeds):
        label = "-" if speed.depth is None else str(speed.depth)
        table.add_row(label + (" *" if index == 0 else ""), *_speed_cells(speed, chips))
    estimate = report.programs[0].reading.estimate
    table.caption = (
        "* the mean or chosen depth. At least: all FLOPs, all bytes or all exchanges over an axis "
        "at peak rates, whichever takes longest. No overlap: operations one after the other, each "
        "as long as its FLOPs or its bytes take at least"
    )
    if len(report.programs) == 1:
        table.caption += (
            f" ({_seconds(estimate.compute_s)} bound by FLOPs, {_seconds(estimate.memory_s)} by "
            f"memory, {_seconds(estimate.exchange_s)} by exchanges)"
        )
    table.caption += ". Neither was measured; trust the comparison of two programs more."
    return table


def _speed_cells(speed: Speed, chips: int) -> Iterable[str]:
    yield _seconds(speed.floor_s)
    yield _seconds(speed.no_overlap_s)
    yield "" if speed.utilisation is None else f"{100 * speed.utilisation:.0f} %"
    yield format_number(speed.tokens_per_s)
    yield format_number(speed.tokens_per_s / chips)
    yield format_number(speed.tokens_per_s * _SECONDS_PER_DAY)


# ------------------------------------------------------------------------------
# One program.


def _flags(reading: ProgramReading, name: str) -> Table:
    table = _table(f"Flags of the {name}", ["flag", "bytes", "what"])
    for flag in reading.flags:
        table.add_row(flag.kind, format_bytes(flag.num_bytes), flag.text)
    if not reading.flags:
        table.add_row("none", "", "")
    return table


def _loops(reading: ProgramReading, name: str) -> Table:
    headings = ["loop", "turns", "each time", "FLOPs of a turn", "bytes of a turn"]
    table = _table(f"Loops of the {name}", headings)
    outer = [loop for loop in reading.loops if loop.parent is None]
    inside = [sum(loop.turns * loop.flops for loop in outer)]
    inside.append(sum(loop.turns * loop.hbm_bytes for loop in outer))
    outside = (reading.flops - inside[0], reading.hbm_bytes - inside[1])
    once = (format_number(max(0.0, outside[0])), format_bytes(max(0.0, outside[1])))
    table.add_row("outside of loops", "1", "", *once)
    depths: dict[str | None, int] = {None: -1}
    for loop in reading.loops:
        depths[loop.name] = depths.get(loop.parent, -1) + 1
        if not loop.flops and loop.turns * loop.hbm_bytes < _NEGLIGIBLE:
            continue
        table.add_row(
            "  " * depths[loop.name] + _path(loop.source or loop.name),
            str(loop.turns),
            f"{loop.trips}, {loop.trips_are}",
            format_number(loop.flops),
            format_bytes(loop.hbm_bytes),
        )
    table.caption = (
        f"In all {format_number(reading.flops)} FLOPs and {format_bytes(reading.hbm_bytes)} of HBM "
        "traffic per call. known: by the compiler; given: by the depth and the sizes; assumed: "
        "depends on data, counted once. Loops without FLOPs that move less than 1 MiB are left out."
    )
    if not reading.flops:
        table.caption += (
            " Products of a single row are computed element by element and not counted as FLOPs; "
            "memory takes the time."
        )
    return table


def _exchanges(reading: ProgramReading, name: str) -> Table:
    headings = ["exchange", "over", "type", "where", "calls", "async", "bytes", "on the wire"]
    headings += ["time", "hidden"]
    table = _table(f"Exchanges of the {name}, per device and call", headings)
    groups: dict[tuple[str, str, str, str], list[Collective]] = {}
    for item in reading.collectives:
        axes = " x ".join(item.axes) or ("slices" if item.kind == "send" else "other groups")
        if item.is_between_slices and item.kind != "send":
            axes += ", network"
        where = "" if item.loop is None else _path(reading.loop(item.loop).source or item.loop)
        groups.setdefault((item.kind, axes, item.dtype, where), []).append(item)

    def wire(items: Sequence[Collective]) -> float:
        return sum(item.total_wire_bytes for item in items)

    for (kind, axes, dtype, where), items in sorted(groups.items(), key=lambda g: -wire(g[1])):
        table.add_row(
            kind,
            axes,
            dtype,
            where or "outside of loops",
            str(sum(item.times for item in items)),
            str(sum(item.times for item in items if item.is_async)),
            format_bytes(sum(item.times * item.logical_bytes for item in items)),
            format_bytes(wire(items)),
            _seconds(sum(item.times * item.seconds for item in items)),
            _seconds(sum(item.times * item.hidden_s for item in items)),
        )
    taken, hidden = reading.estimate.exchange_s, reading.estimate.hidden_s
    table.caption = (
        f"In all {format_bytes(reading.wire_bytes)} on the wire, {_seconds(taken)} at the rate of "
        f"their links. Other operations run in {_seconds(hidden)} of this, as the schedule has it: "
        "hidden."
    )
    return table


def _copies(reading: ProgramReading, name: str) -> Table:
    table = _table(f"Copies of the {name}", ["of", "shape", "bytes", "calls", "where"])
    for copy in reading.copies[:10]:
        where = "" if copy.loop is None else _path(reading.loop(copy.loop).source or copy.loop)
        table.add_row(
            copy.of or "temporary",
            copy.shape,
            format_bytes(copy.num_bytes),
            str(copy.times),
            where or "outside of loops",
        )
    return table


def _buffers(reading: ProgramReading, name: str) -> Table:
    table = _table(f"Largest arrays of the {name}", ["shape", "bytes", "made by"])
    least = _FEW * reading.buffers[0].num_bytes
    for buffer in reading.buffers:
        if buffer.num_bytes < least:
            break
        table.add_row(buffer.shape, format_bytes(buffer.num_bytes), _path(buffer.source))
    table.caption = (
        f"At its fullest moment the program has {format_bytes(reading.live_bytes)} in HBM besides "
        "arguments and results. Temporaries beyond that are gaps between arrays, or lie in fast "
        "memory on the chip."
    )
    return table


def _path(source: str) -> str:
    return source if len(source) <= _PATH_WIDTH else "..." + source[3 - _PATH_WIDTH :]


def _seconds(value: float) -> str:
    if value == 0:
        return "0"
    if value >= 1:
        return f"{value:.2f} s"
    return f"{1e3 * value:.2f} ms" if value >= 1e-3 else f"{1e6 * value:.1f} us"


def _table(title: str, headings: list[str]) -> Table:
    table = Table(title=title)
    for heading in headings:
        is_text = heading in ("what", "value", "loop", "where", "shape", "made by", "flag", "of")
        table.add_column(heading, justify="left" if is_text else "right")
    return table
