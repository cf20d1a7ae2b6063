"""What programs compiled for TPUs and GPUs that are not here say: whether they fit, what they do.

`megatransformer compile` and `mt.inspect(..., topology=...)` show it. Nothing runs, and no weights
are made.
"""

import contextlib
import dataclasses
import importlib.metadata
import math
import pathlib
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax

from megatransformer_jax.compiled.chips import Chip, chip_of
from megatransformer_jax.compiled.program import read_program
from megatransformer_jax.compiled.reading import ProgramReading
from megatransformer_jax.config.compiling import DEFAULT_CAPACITY, CompileConfig
from megatransformer_jax.config.option import ConfigError
from megatransformer_jax.config.run import RunConfig
from megatransformer_jax.config.run_base import BaseRunConfig
from megatransformer_jax.config.run_kinds import require_transformer
from megatransformer_jax.config.run_rules import media_places
from megatransformer_jax.models.attention_kernels import KernelChoice
from megatransformer_jax.models.cost.flops import forward_flops, train_flops
from megatransformer_jax.nn.kv_cache import BLOCK_ROWS
from megatransformer_jax.runs.build import trained_depth
from megatransformer_jax.runs.compile_programs import PhasePrograms, phase_programs
from megatransformer_jax.runs.cost import format_bytes
from megatransformer_jax.sharding.mesh import describe_layout
from megatransformer_jax.sharding.rules import MESH_AXES
from megatransformer_jax.sharding.topology import Topology, describe_devices, parse_topology
from megatransformer_jax.storage import write_json
from megatransformer_jax.training.micro_batch import StepMemory, step_memory

# Told what is being done, such as 'compiling the train step'.
Progress = Callable[[str], object]
# Parts of the paths of loops whose turns depend on data, see `read_program`.
_ATTENTION_LOOP = "_attend_to_cache/while"
_TRAIN_LOOP = "_iterate_core/while"
# On a GPU the compiler chooses kernels of products by timing them. Without one it would take the
# first of its own, which is slow, so each product is a call of cuBLAS instead.
GPU_OPTIONS = {"xla_gpu_enable_triton_gemm": False}
_SETTLING_LOOP, _TERMS_LOOP = "settle/while", "sum_terms/while"

# ------------------------------------------------------------------------------
# The report.


@dataclasses.dataclass(frozen=True)
class CompiledProgram:
    """One program.

    Attributes:
      name: such as 'train step'.
      lower_s: seconds of tracing and lowering.
      compile_s: seconds of the compiler.
      memory: on one device. None: the compiler gave up, as the program does not fit.
      peak_bytes: the most at one time, as the compiler says it; code included.
      problem: why it does not fit; empty if it does.
      readings: by the depth that loops of traced length are read at; None without a core. Empty if
        it does not fit.
      hlo: the compiled program as text; empty if the compiler gave up.
    """

    name: str
    lower_s: float
    compile_s: float
    memory: StepMemory | None
    peak_bytes: int
    problem: str
    readings: Mapping[int | None, ProgramReading]
    hlo: str = dataclasses.field(repr=False)

    @property
    def fits(self) -> bool:
        """Whether there is room for it."""
        return not self.problem

    @property
    def reading(self) -> ProgramReading:
        """At the first depth, the mean."""
        return next(iter(self.readings.values()))


@dataclasses.dataclass(frozen=True)
class Speed:
    """Estimates at one depth; see `compiled.reading.Estimate` for what they are worth.

    Attributes:
      depth: iterations per token; None without a core.
      floor_s: of a call, if everything overlaps.
      no_overlap_s: of a call, if nothing overlaps.
      tokens: of a call, over all chips.
      utilisation: share of the peak rate without overlap that computes something that was not
        computed before (MFU). None where attention reads a cache.
    """

    depth: int | None
    floor_s: float
    no_overlap_s: float
    tokens: int
    utilisation: float | None

    @property
    def tokens_per_s(self) -> float:
        """Over all chips, without overlap."""
        return self.tokens / self.no_overlap_s if self.no_overlap_s else math.inf


@dataclasses.dataclass(frozen=True)
class Headroom:
    """How many rows fit.

    Attributes:
      most: rows that were compiled and fit, over all devices.
      too_many: rows that were compiled and did not fit. None: none were that many.
      estimate: rows that would fit, by a straight line through what was compiled. None: not known.
    """

    most: int
    too_many: int | None
    estimate: int | None


@dataclasses.dataclass(frozen=True)
class CompileReport:
    """All that the command shows.

    Attributes:
      topology: the slices or machines.
      chip: what they are made of.
      device_kind: as JAX names it.
      layout: what each axis of the mesh lies on; empty on one device.
      mesh: devices on each axis; empty on one device.
      compiling: which programs.
      rows: of the batch, over all devices.
      attention: kernels of passes over whole rows.
      cache_bytes: keys and values on one device; 0 without a cache.
      programs: at least one.
      speeds: by depth; empty if something does not fit.
      headroom: None if it was not asked for, or nothing fits.
      versions: of jax and the compiler.
      flags: variables that the compiler reads, as far as the caller knows them.
    """

    topology: Topology
    chip: Chip
    device_kind: str
    layout: str
    mesh: dict[str, int]
    compiling: CompileConfig
    rows: int
    attention: tuple[KernelChoice, ...]
    cache_bytes: int
    programs: tuple[CompiledProgram, ...]
    speeds: tuple[Speed, ...]
    headroom: Headroom | None
    versions: dict[str, str]
    flags: dict[str, str] = dataclasses.field(default_factory=dict)

    @property
    def fits(self) -> bool:
        """Whether every program does."""
        return all(program.fits for program in self.programs)

    def to_dict(self) -> dict[str, Any]:
        """For JSON; the text of the programs is left out."""
        values = {
            "topology": str(self.topology),
            "chips": self.topology.chips,
            "phase": self.compiling.phase,
            "fits": self.fits,
            "speeds": [
                dataclasses.asdict(speed) | {"tokens_per_s": speed.tokens_per_s}
                for speed in self.speeds
            ],
            "programs": [_program_dict(program) for program in self.programs],
            "headroom": None if self.headroom is None else dataclasses.asdict(self.headroom),
            "compiling": dataclasses.asdict(self.compiling),
            "attention": [dataclasses.asdict(choice) for choice in self.attention],
            "chip": dataclasses.asdict(self.chip),
        }
        same = ("device_kind", "layout", "mesh", "rows", "cache_bytes", "versions", "flags")
        return values | {name: getattr(self, name) for name in same}

    def write(self, folder: pathlib.Path) -> list[pathlib.Path]:
        """Writes compiled.json with all numbers into a folder; returns its path."""
        path = folder / "compiled.json"
        write_json(path, self.to_dict())
        return [path]


def _program_dict(program: CompiledProgram) -> dict[str, Any]:
    memory = program.memory
    return {
        "name": program.name,
        "fits": program.fits,
        "problem": program.problem,
        "lower_s": program.lower_s,
        "compile_s": program.compile_s,
        "memory": None if memory is None else memory._asdict() | {"total": memory.total},
        "peak_bytes": program.peak_bytes,
        "readings": [
            {"depth": depth} | reading.to_dict() for depth, reading in program.readings.items()
        ],
    }


# ------------------------------------------------------------------------------
# Compiling.


def compile_for_topology(
    run: BaseRunConfig, compiling: CompileConfig, progress: Progress = lambda doing: None
) -> CompileReport:
    """Compiles the programs of a phase for TPUs or GPUs that need not be here, and reads them.

    Args:
      run: the configuration of the run.
      compiling: which programs for which slices.
      progress: told what is being done.

    Raises:
      ConfigError: if mesh, model and sizes do not fit together, or the slice does not exist.
      UserError: if libtpu or JAX's CUDA plugin is missing, or cannot be used in this process.
    """
    config = require_transformer(run)
    assert compiling.topology is not None  # A rule says so.
    topology = parse_topology(compiling.topology, compiling.slices)
    progress(f"describing {topology}")
    devices = describe_devices(topology)
    phase = phase_programs(config, compiling, devices)
    chip = chip_of(topology)
    reader = _reader(config, compiling, phase, chip)
    compiled = tuple(_compile_phase(phase, chip, reader, progress))
    fits = all(program.fits for program in compiled)
    headroom = None
    if compiling.headroom and fits:
        headroom = _find_headroom(config, compiling, devices, chip, phase, compiled, progress)
    return CompileReport(
        topology=topology,
        chip=chip,
        device_kind=devices[0].device_kind,
        layout="" if phase.mesh is None else describe_layout(phase.mesh),
        mesh={} if phase.mesh is None else dict(phase.mesh.shape),
        compiling=compiling,
        rows=phase.rows,
        attention=phase.kernels,
        cache_bytes=phase.cache_bytes,
        programs=compiled,
        speeds=_speeds(config, compiling, phase, compiled) if fits else (),
        headroom=headroom,
        versions=dict(_versions(chip.platform)),
    )


def _versions(platform: str) -> Iterator[tuple[str, str]]:
    """Of what compiles for a platform. JAX's CUDA plugin is named after the CUDA that it needs."""
    names = ("libtpu",) if platform == "tpu" else ("jax-cuda13-pjrt", "jax-cuda12-pjrt")
    for name in ("jax", *names):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            yield name, importlib.metadata.version(name)


# Of a program's name and text: what it does at each depth.
_Reader = Callable[[str, str], Mapping[int | None, ProgramReading]]


def _compile_phase(
    phase: PhasePrograms, chip: Chip, read: _Reader, progress: Progress, note: str = ""
) -> Iterator[CompiledProgram]:
    """All programs. What they are given is counted first, as the compiler takes minutes and more
    over arrays that no chip could hold."""
    held = phase.held_bytes
    for name, lower in phase.lower.items():
        if held > chip.hbm_bytes:
            problem = (
                f"weights and cache alone take {format_bytes(held)} of "
                f"{format_bytes(chip.hbm_bytes)} HBM; not compiled."
            )
            yield CompiledProgram(name, 0.0, 0.0, None, 0, problem, {}, "")
        else:
            options = GPU_OPTIONS if chip.platform == "gpu" else None
            program = compile_program(name + note, lower, read, progress, options)
            yield program if options is None else _checked_gpu_memory(program, chip)


def _checked_gpu_memory(program: CompiledProgram, chip: Chip) -> CompiledProgram:
    """The compiler for GPUs finishes programs that are too large, too."""
    memory = program.memory
    if memory is None or memory.total <= chip.hbm_bytes:
        return program
    problem = (
        f"it needs {format_bytes(memory.total)}, and JAX takes {format_bytes(chip.hbm_bytes)} of "
        "the GPU's memory by default; use more mesh.fsdp, train.accumulation or model.remat."
    )
    return dataclasses.replace(program, problem=problem, readings={})


def compile_program(
    name: str,
    lower: Callable[[], jax.stages.Lowered],
    read: _Reader,
    progress: Progress,
    options: dict[str, Any] | None = None,
) -> CompiledProgram:
    """Compiles one program and reads it; if it does not fit, says what the compiler says."""
    began = time.perf_counter()
    progress(f"lowering the {name}")
    lowered = lower()
    lower_s = time.perf_counter() - began
    progress(f"compiling the {name}")
    began = time.perf_counter()
    try:
        compiled = lowered.compile(compiler_options=options)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        taken = time.perf_counter() - began
        return CompiledProgram(name, lower_s, taken, None, 0, _problem(str(error)), {}, "")
    compile_s = time.perf_counter() - began
    progress(f"reading the {name}")
    text = compiled.as_text()
    assert text is not None  # Of programs for TPUs and GPUs there always is one.
    peak = getattr(compiled.memory_analysis(), "peak_memory_in_bytes", 0)
    memory = step_memory(compiled)
    return CompiledProgram(name, lower_s, compile_s, memory, peak, "", read(name, text), text)


def _problem(error: str) -> str:
    """The first sentence of the compiler's error, without its code."""
    lines = [line.strip() for line in error.splitlines() if line.strip()]
    return re.sub(r"^RESOURCE_EXHAUSTED:\s*", "", lines[0]) if lines else "out of memory"


# ------------------------------------------------------------------------------
# Loops whose turns depend on data, and the speed at a depth.


def depths_of(config: RunConfig, compiling: CompileConfig) -> list[int | None]:
    """Depths that programs are read at: the mean first, then the most that training draws."""
    mean = trained_depth(config)
    if mean is None:
        return [None]
    if compiling.phase != "train":
        return [compiling.depth or mean]
    most = config.model.recurrence.max_steps
    is_fixed = config.model.recurrence.sampling == "fixed"
    return [mean] if is_fixed or most == mean else [mean, most]


def _reader(
    config: RunConfig, compiling: CompileConfig, phase: PhasePrograms, chip: Chip
) -> _Reader:
    mesh = dict.fromkeys(MESH_AXES, 1) if phase.mesh is None else dict(phase.mesh.shape)

    def read(name: str, text: str) -> Mapping[int | None, ProgramReading]:
        return {
            depth: read_program(
                text, mesh, chip, traced_trips=_traced_trips(config, compiling, depth, name, chip)
            )
            for depth in depths_of(config, compiling)
        }

    return read


def _traced_trips(
    config: RunConfig, compiling: CompileConfig, depth: int | None, name: str, chip: Chip
) -> dict[str, int]:
    """Turns of loops by a part of their path; the first part that fits counts."""
    iterations = depth or 1
    match compiling.phase:
        case "train":
            recurrence = config.model.recurrence
            if recurrence.gradient == "implicit":
                return {_TERMS_LOOP: recurrence.backprop_depth - 1, _SETTLING_LOOP: iterations - 1}
            return {_TRAIN_LOOP: max(0, iterations - recurrence.backprop_depth)}
        case "prefill":
            return {_ATTENTION_LOOP: 1, "/while": iterations}
        case "decode":
            # At the middle of the new tokens, in whole blocks of the cache.
            filled = compiling.prompt_tokens + compiling.new_tokens // 2
            return {
                _ATTENTION_LOOP: _blocks(filled, chip),
                "/while/body/while": iterations,
                "/while": compiling.new_tokens,
            }
    # A server's rows are half full.
    capacity = compiling.capacity or min(DEFAULT_CAPACITY, config.model.max_length)
    trips = {_ATTENTION_LOOP: _blocks(capacity // 2, chip)}
    loop = {"prefill": ")/while", "step": "/advance/while"}.get(name)
    return trips if loop is None else trips | {loop: iterations}


def _blocks(rows: int, chip: Chip) -> int:
    return max(1, -(-rows // BLOCK_ROWS[chip.platform]))


def _speeds(
    config: RunConfig,
    compiling: CompileConfig,
    phase: PhasePrograms,
    compiled: Sequence[CompiledProgram],
) -> tuple[Speed, ...]:
    chips = 1 if phase.mesh is None else phase.mesh.size
    return tuple(
        _speed(config, compiling, phase, compiled, depth, chips)
        for depth in depths_of(config, compiling)
    )


def _speed(
    config: RunConfig,
    compiling: CompileConfig,
    phase: PhasePrograms,
    compiled: Sequence[CompiledProgram],
    depth: int | None,
    chips: int,
) -> Speed:
    readings = {program.name: program.readings[depth] for program in compiled}
    tokens, useful = phase.rows, None
    match compiling.phase:
        case "train":
            length = config.data.sequence_length
            tokens *= length
            flops = forward_flops(config.model, length + sum(media_places(config)))
            useful = train_flops(config.model, flops, depth or 0).model
        case "prefill":
            tokens *= compiling.prompt_tokens
            useful = forward_flops(config.model, compiling.prompt_tokens).total(depth or 0)
        case "decode":
            tokens *= compiling.new_tokens
    calls = dict.fromkeys(readings, 1)
    if compiling.phase == "serve":
        # All rows keep step: so many iterations and a turn give each of them a token.
        calls = {"step" if "step" in readings else "turn": 1}
    floor = sum(readings[name].estimate.floor_s * count for name, count in calls.items())
    slow = sum(readings[name].estimate.no_overlap_s * count for name, count in calls.items())
    share = None
    if useful is not None:
        reading = next(iter(readings.values()))
        share = reading.estimate.utilisation(useful * tokens / chips, reading.chip)
    return Speed(depth, floor, slow, tokens, share)


# ------------------------------------------------------------------------------
# How many rows fit.

# Halving ends at this part of the rows that are known to fit.
_PRECISION = 16


def _find_headroom(
    config: RunConfig,
    compiling: CompileConfig,
    devices: Sequence[Any],
    chip: Chip,
    phase: PhasePrograms,
    compiled: Sequence[CompiledProgram],
    progress: Progress,
) -> Headroom:
    """Compiles twice the rows; if they do not fit, halves the distance."""
    step, least = phase.row_step, phase.rows
    now = max(_total(program) for program in compiled)

    def needed_by(rows: int) -> int | None:
        """Bytes of the largest program with so many rows; None if one does not fit."""
        try:
            asked = phase_programs(*_with_rows(config, compiling, rows), devices)
        except ConfigError:
            return None
        totals = []
        note = f" with {rows} rows"
        for program in _compile_phase(asked, chip, lambda *given: {}, progress, note):
            if not program.fits:
                return None
            totals.append(_total(program))
        return max(totals)

    doubled = needed_by(2 * least)
    if doubled is not None:
        room = chip.hbm_bytes - doubled
        slope = (doubled - now) / least
        more = max(0, int(room / slope) // step * step) if slope > 0 else None
        return Headroom(2 * least, None, None if more is None else 2 * least + more)
    fits, too_many = least, 2 * least
    while too_many - fits > max(step, least // _PRECISION):
        middle = (fits + too_many) // 2 // step * step
        middle = max(middle, fits + step)
        if needed_by(middle) is None:
            too_many = middle
        else:
            fits = middle
    return Headroom(fits, too_many, None)


def _total(program: CompiledProgram) -> int:
    return 0 if program.memory is None else program.memory.total


def _with_rows(
    config: RunConfig, compiling: CompileConfig, rows: int
) -> tuple[RunConfig, CompileConfig]:
    if compiling.phase == "train":
        data = dataclasses.replace(config.data, batch_size=rows)
        return dataclasses.replace(config, data=data), compiling
    return config, dataclasses.replace(compiling, rows=rows)
