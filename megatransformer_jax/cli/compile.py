"""Compiles a run for TPUs or GPUs that need not be here: `megatransformer compile`."""

import concurrent.futures
import dataclasses
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, TypeVar

from megatransformer_jax.cli.flags import PROGRAM, Command, Parsed
from megatransformer_jax.cli.launch import PLAIN_WIDTH, write_file
from megatransformer_jax.config.compiling import CompileConfig
from megatransformer_jax.config.option import (
    ConfigError,
    UserError,
    option,
    part_of,
    require_defaults,
    rule,
)
from megatransformer_jax.extras import import_extra
from megatransformer_jax.sharding.topology import (
    QUIET_ENVIRONMENT,
    Topology,
    parse_topology,
)
from megatransformer_jax.storage import local_path

if TYPE_CHECKING:
    from rich.console import Console

    from megatransformer_jax.config.run_base import BaseRunConfig
    from megatransformer_jax.runs.compile import CompileReport

_T = TypeVar("_T")
DEFAULT_BUDGET = 30.0
# Variables that change what the compiler does.
FLAG_VARIABLES = ("LIBTPU_INIT_ARGS", "XLA_FLAGS")
# Exit code of programs that do not fit. 1 is that of a crash, 2 of bad input.
DOES_NOT_FIT = 4
# Seconds between updates of the line in a terminal, and between lines elsewhere.
_REFRESH_SECONDS, _LINE_SECONDS = 0.5, 60.0


@dataclasses.dataclass(frozen=True)
class CompileOptions(CompileConfig):
    """What is compiled, and where the numbers go."""

    json: str | None = option(None, "Also writes the exact numbers to this file.")
    hlo: str | None = option(
        None,
        "Also writes the compiled programs to this file, as text. Several programs: each to a file "
        "with the program's name before the suffix.",
    )

    search: bool = option(
        False,
        "Tries meshes, remat and micro-batches for the train step, and ranks those that fit; the "
        "run's own mesh, remat and accumulation do not count.",
    )
    budget: float = option(
        DEFAULT_BUDGET, "Minutes after which a search begins no other trial.", above=0
    )

    @rule("search")
    def _searches_are_for_train_steps(self) -> None:
        """Only with phase='train', without headroom and hlo."""
        if not self.search:
            return
        names = ("phase", "headroom", "hlo")
        require_defaults(self, names, "with search", "leave out search")

    @rule("budget")
    def _a_budget_is_for_a_search(self) -> None:
        """Keep the default without search."""
        if not self.search:
            require_defaults(self, ("budget",), "without search", "set search")

    @rule("topology")
    def _the_slice_exists(self) -> None:
        """A known accelerator, box of chips, or machine with GPUs."""
        if self.topology:
            parse_topology(self.topology, self.slices)


def compile_run(parsed: Parsed) -> None:
    """Compiles, prints what the programs do and writes the files that were asked for.

    Exits with 4 if a program does not fit.

    Raises:
      UserError: if the run does not fit the mesh, libtpu or JAX's CUDA plugin is missing, or a file
        cannot be written.
    """
    options: CompileOptions = parsed.options
    config = parsed.config
    if config is None:
        raise ConfigError(
            "config",
            f"is missing; name an experiment or a size, such as {PROGRAM} compile "
            "--config.preset=recurrent_small --topology=v4-8.",
        )
    for name in ("json", "hlo"):
        _check_file(name, getattr(options, name))
    assert options.topology is not None  # A rule says so.
    use_described_devices(parse_topology(options.topology, options.slices))
    # It imports JAX, which reads its environment then.
    from rich.console import Console  # noqa: PLC0415

    console = Console()
    if not console.is_terminal:
        console.width = PLAIN_WIDTH
    run = _search if options.search else _compile
    if not run(console, config, options):
        what = "nothing that was tried fits" if options.search else "does not fit"
        several = f"{options.slices} x " if options.slices > 1 else ""
        print(f"{what} {several}{options.topology}", file=sys.stderr)
        sys.exit(DOES_NOT_FIT)


def _compile(console: "Console", config: "BaseRunConfig", options: CompileOptions) -> bool:
    """Shows one report; returns whether everything fits."""
    from megatransformer_jax.runs.compile import compile_for_topology  # noqa: PLC0415
    from megatransformer_jax.runs.compile_tables import (  # noqa: PLC0415
        compile_tables,
        print_compiled,
    )

    compiling = part_of(options, CompileConfig)
    report = _watched(lambda progress: compile_for_topology(config, compiling, progress))
    flags = {name: os.environ[name] for name in FLAG_VARIABLES if os.environ.get(name)}
    report = dataclasses.replace(report, flags=flags)
    print_compiled(console, compile_tables(report))
    if options.json is not None:
        write_file("json", options.json, json.dumps(report.to_dict(), indent=2) + "\n")
    if options.hlo is not None:
        _write_programs(options.hlo, report)
    return report.fits


def _search(console: "Console", config: "BaseRunConfig", options: CompileOptions) -> bool:
    """Shows the trials; returns whether one fits."""
    from megatransformer_jax.runs.compile_search import search, search_table  # noqa: PLC0415
    from megatransformer_jax.runs.compile_tables import print_compiled  # noqa: PLC0415

    assert options.topology is not None  # A rule says so.
    compiling = part_of(options, CompileConfig)
    budget_s = 60 * options.budget
    found = _watched(lambda progress: search(config, compiling, budget_s, progress))
    chips = parse_topology(options.topology, options.slices).chips
    print_compiled(console, [search_table(found, chips)])
    if options.json is not None:
        write_file("json", options.json, json.dumps(found.to_dict(), indent=2) + "\n")
    return found.fits


def use_described_devices(topology: Topology) -> None:
    """Sets the environment in which devices are described; variables that are set are kept.

    Whether JAX's CUDA plugin is there is found out when it is asked for devices.

    Raises:
      UserError: if JAX has been imported already, which would not see them, or libtpu is missing.
    """
    wanted: Mapping[str, str] = {"JAX_PLATFORMS": "cpu"}
    if topology.gpu is None:
        import_extra("libtpu", "tpu", f"{PROGRAM} compile")
        wanted = QUIET_ENVIRONMENT
    missing = {name: value for name, value in wanted.items() if name not in os.environ}
    if missing and "jax" in sys.modules:
        raise UserError(
            "JAX is already imported (the experiment 'retrofit' reads a model with it), so it "
            "would not see the variables that describing devices needs; set them in the shell: "
            + " ".join(f"{name}={value}" for name, value in missing.items())
        )
    os.environ.update(missing)


# ------------------------------------------------------------------------------
# While it compiles, which takes from seconds to a quarter of an hour.


def _watched(work: Callable[[Callable[[str], object]], _T]) -> _T:
    """What `work` returns, with a live line in a terminal, else a line a minute, while it goes on.

    The lines go to stderr, so that the tables can be piped. The compiler ignores Ctrl-C,
    so it runs in its own thread.

    Args:
      work: gets a function that is to be told what is being done.
    """
    from rich.console import Console  # noqa: PLC0415

    console, watch = Console(stderr=True, highlight=False, soft_wrap=True), _Watch()
    done: concurrent.futures.Future[_T] = concurrent.futures.Future()

    def run() -> None:
        try:
            done.set_result(work(watch.tell))
        except BaseException as error:
            done.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    if console.is_terminal:
        with console.status(str(watch)) as status:
            while not concurrent.futures.wait([done], _REFRESH_SECONDS).done:
                status.update(str(watch))
    else:
        while not concurrent.futures.wait([done], _LINE_SECONDS).done:
            console.print(str(watch), markup=False)
    return done.result()


class _Watch:
    """What is being done, since when."""

    def __init__(self) -> None:
        self._began = self._told = time.monotonic()
        self._doing = "starting"

    def tell(self, doing: str) -> None:
        """Something new is being done."""
        self._told, self._doing = time.monotonic(), doing

    def __str__(self) -> str:
        now = time.monotonic()
        return f"{_clock(now - self._began)} {self._doing} (for {_clock(now - self._told)})"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes}:{rest:02}"


# ------------------------------------------------------------------------------
# Files.


def _check_file(name: str, path: str | None) -> None:
    """Compiling may take long, so that a wrong path is told before."""
    if path is None:
        return
    file = local_path(name, path)
    if not file.parent.is_dir():
        raise ConfigError(name, f"folder {file.parent} does not exist; make it first.")
    if file.is_dir():
        raise ConfigError(name, f"{path} is a folder; name a file in it.")


def _write_programs(path: str, report: "CompileReport") -> None:
    file = local_path("hlo", path)
    for program in report.programs:
        if not program.hlo:
            continue
        name = program.name.replace(" ", "_")
        single = file if len(report.programs) == 1 else file.with_stem(f"{file.stem}_{name}")
        write_file("hlo", str(single), program.hlo)


COMMAND = Command(
    name="compile",
    doc="""Compiles a run for TPUs or GPUs that need not be here, and says what the programs do.

Whether they fit, which attention kernel each stack has, what is exchanged over which axis of the
mesh, loops, copies, the largest arrays, what should be otherwise, and how long a call takes at
least. Nothing runs, and no weights are made. The extra 'tpu' or 'cuda' is needed, but no TPU and no
GPU. Exits with 4 if a program does not fit. docs/pods.md explains each line.""",
    options=CompileOptions,
    run=compile_run,
    examples=(
        "--config.preset=recurrent_small --topology=v4-8 --config.mesh.fsdp=4",
        "--config=recurrent --topology=v5e-16 --headroom --json=compiled.json",
        "--config=recurrent:small --topology=v4-8 --search --budget=20",
        "--config.preset=recurrent_medium --topology=v5e-1 --phase=decode --depth=32",
        "--config=recurrent:small --topology=h100-8",
    ),
    takes_run=True,
)
