"""All commands of `megatransformer`: their names, and those that take a few lines."""

import contextlib
import dataclasses
import importlib.metadata
import json
import os
import sys
from collections.abc import Callable, Sequence

from megatransformer_jax.cli.checkpoint_commands import AVERAGE, EXPORT, OLD_OUTPUT, PRUNE
from megatransformer_jax.cli.flags import PROGRAM, Command, Parsed
from megatransformer_jax.cli.launch import PLAIN_WIDTH, errors_in_one_line, run_command, write_file
from megatransformer_jax.cli.model_options import (
    OLD_MODEL_NAMES,
    model_folder,
    model_option,
    step_option,
)
from megatransformer_jax.cli.supervise import Outcome, supervised
from megatransformer_jax.config.option import (
    MAX_COUNT,
    ConfigError,
    UserError,
    check_options,
    nearest_hint,
    option,
    rule,
)
from megatransformer_jax.config.run_base import BaseRunConfig
from megatransformer_jax.extras import import_extra
from megatransformer_jax.sharding.devices import DEVICE_NAMES
from megatransformer_jax.storage import as_path, local_path


def main(name: str | None = None, arguments: Sequence[str] | None = None) -> None:
    """Runs a command.

    Args:
      name: of the command. None: the first word of the command line says.
      arguments: the words after the name; None: those of the process.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if name is None:
        if not arguments or arguments[0] in ("-h", "--help", "help"):
            print(overview())
            return
        if arguments[0] == "--version":
            print(f"{PROGRAM} {importlib.metadata.version('megatransformer_jax')}")
            return
        name, *arguments = arguments
    with errors_in_one_line():
        if name == _LM_EVAL:
            _run_lm_eval(arguments)
        else:
            run_command(find_command(name), arguments)


def overview() -> str:
    """What `megatransformer --help` prints."""
    width = max(map(len, SUMMARIES))
    lines = [f"  {name:{width}}  {summary}" for name, summary in SUMMARIES.items()]
    return "\n".join(
        [
            f"Usage: {PROGRAM} COMMAND [--option=value ...]",
            "",
            "Depth-recurrent transformers in JAX.",
            "",
            "Commands:",
            *lines,
            "",
            f"{PROGRAM} COMMAND --help lists the options of a command. In Python: "
            "import megatransformer_jax as mt.",
            "",
            "Exit codes: 0 done, or stopped by a signal with everything saved; 2 bad input, so the "
            "same command fails again;",
            "3 storage, a lock or another process failed, so the same command may succeed later.",
        ]
    )


def find_command(name: str) -> Command:
    """The command of that name.

    Raises:
      UserError: if there is none; names the nearest.
    """
    if name in COMMANDS:
        _, load = COMMANDS[name]
        return load()
    hint = nearest_hint(name.replace("_", "-"), SUMMARIES, str)
    raise UserError(f"{name!r} is not a command; {hint}commands are {', '.join(SUMMARIES)}.")


def _require_run(parsed: Parsed, command: str) -> BaseRunConfig:
    if parsed.config is None:
        raise ConfigError(
            "config",
            f"is missing; name an experiment, such as {PROGRAM} {command} --config=recurrent.",
        )
    return parsed.config


# ------------------------------------------------------------------------------
# Runs: train, find-lr, inspect.


@dataclasses.dataclass(frozen=True)
class NoOptions:
    """A run's configuration says all."""


def train(parsed: Parsed) -> None:
    """Runs the training that the configuration describes."""
    config = _require_run(parsed, "train")
    watched: contextlib.AbstractContextManager[Outcome | None] = contextlib.nullcontext()
    if config.distributed.enabled:
        watched = supervised(shows_native_errors=config.logging.level == "debug")
    with watched as outcome:
        # JAX reads its environment when it is imported, which is set just before.
        from megatransformer_jax.runs.train import train as train_run  # noqa: PLC0415

        result = train_run(config)
        if outcome is not None:
            outcome.is_stopped = not result.is_finished


TRAIN = Command(
    name="train",
    doc="""Trains a model, resuming if the workdir has a checkpoint.

Writes into the workdir: config.json, train.log, metrics.jsonl (every step, exact), events/
(TensorBoard), checkpoints/, tokenizer.model and .json, depth_table.json and .png. Ctrl-C or SIGTERM
saves and leaves; the same command continues.""",
    options=NoOptions,
    run=train,
    hints={"workdir": "did you mean --config.workdir? --help lists all."},
    examples=(
        "--config=recurrent",
        "--config=reasoning:diagonal --config.workdir=runs/mine",
        "--config=my/experiment.py --config.train.steps=1000",
    ),
    takes_run=True,
)


@dataclasses.dataclass(frozen=True)
class FindLrOptions:
    """Which rates are tried."""

    start: float = option(1e-6, "First learning rate.", above=0)
    end: float = option(1.0, "Last learning rate.", above=0)
    steps: int = option(
        100,
        "Number of steps from the first rate to the last, unless the loss blows up earlier.",
        minimum=2,
        maximum=MAX_COUNT,
    )

    def __post_init__(self) -> None:
        check_options(self)


def find_lr(parsed: Parsed) -> None:
    """Runs the test on a configuration."""
    config = _require_run(parsed, "find-lr")
    from megatransformer_jax.runs.find_lr import find_learning_rate  # noqa: PLC0415

    find_learning_rate(config, parsed.options.start, parsed.options.end, parsed.options.steps)


FIND_LR = Command(
    name="find-lr",
    doc="""Suggests a learning rate: trains for some steps while the rate rises.

Starts as a new run with this configuration would, with its optimiser, and keeps nothing of what it
trains. Writes find_lr.json and find_lr.png into the workdir; checkpoints there are left alone.""",
    options=FindLrOptions,
    run=find_lr,
    examples=("--config=recurrent", "--config=recurrent --start=1e-5 --end=0.1 --steps=200"),
    takes_run=True,
)


@dataclasses.dataclass(frozen=True)
class InspectOptions:
    """What is inspected, and where the numbers go."""

    model: str | None = option(None, "Folder of a run, instead of --config: what it costs.")
    output: str | None = option(None, "Also writes the exact numbers to this JSON file.")
    device: str | None = option(
        None,
        "Kind of device to train on: its kernels, types and memory count. Default (None): this "
        "machine's.",
        choices=DEVICE_NAMES,
    )

    def __post_init__(self) -> None:
        check_options(self)


def inspect(parsed: Parsed) -> None:
    """Prints the costs of a run."""
    # JAX reads its environment when it is imported, which is set just before.
    from rich.console import Console  # noqa: PLC0415

    from megatransformer_jax.runs.cost import make_report, print_tables  # noqa: PLC0415

    options: InspectOptions = parsed.options
    config = parsed.config
    if options.model is not None:
        if config is not None:
            raise ConfigError("model", "does not go together with --config; give one of the two.")
        from megatransformer_jax.runs.load import read_run_config  # noqa: PLC0415

        config = read_run_config(model_folder(options.model))
    if config is None:
        config = _require_run(parsed, "inspect")
    report = make_report(config, options.device)
    console = Console()
    if not console.is_terminal:
        console.width = PLAIN_WIDTH
    print_tables(console, report, config)
    if options.output is not None:
        write_file("output", options.output, json.dumps(report.to_dict(), indent=2) + "\n")


INSPECT = Command(
    name="inspect",
    doc="""Shows what a run costs, without allocating the model.

Parameters by module, FLOPs per token and key/value cache as a function of depth, memory of
training. The depths are evaluation.final_depths, the mesh need not exist here, and types and
attention kernels are those of this machine's kind of device.""",
    options=InspectOptions,
    run=inspect,
    examples=("--config.preset=huginn_3_5b --device=v4", "--config=recurrent --output=cost.json"),
    takes_run=True,
    old_names=OLD_MODEL_NAMES | {"json": "output"},
)


# ------------------------------------------------------------------------------
# Finished runs: diagnose, compare.


@dataclasses.dataclass(frozen=True)
class DiagnoseOptions:
    """What is drawn of which run, and where the files go."""

    model: str | None = model_option()
    step: str = step_option()
    kinds: tuple[str, ...] = option(
        (), "Figures to draw. Default (empty): all that apply to the model."
    )
    num_rows: int = option(
        2, "Number of rows of the first validation batch to look at.", minimum=1, maximum=MAX_COUNT
    )
    num_steps: int | None = option(
        None,
        "Number of iterations to plot. Default (None): twice the trained mean.",
        minimum=1,
        maximum=MAX_COUNT,
    )
    output: str | None = option(
        None,
        "Folder for the files. Default (None): diagnostics/step_STEP in the folder of the run.",
    )

    def __post_init__(self) -> None:
        check_options(self)


def diagnose(parsed: Parsed) -> None:
    """Draws figures of a run."""
    options: DiagnoseOptions = parsed.options
    folder = model_folder(options.model)
    from megatransformer_jax.runs.diagnose import diagnose_run  # noqa: PLC0415

    written = diagnose_run(
        folder,
        step=options.step,
        kinds=options.kinds,
        num_rows=options.num_rows,
        num_steps=options.num_steps,
        output=options.output,
    )
    print(f"figures and numbers: {written}")


DIAGNOSE = Command(
    name="diagnose",
    doc="""Looks into the model of a run: draws the figures that diagnostics draw during training.

The figures (.png) and scalars.json with their numbers go to a folder. The kinds are those of
diagnostics.kinds except for depth_draws, which only a run that is going on has.""",
    options=DiagnoseOptions,
    run=diagnose,
    examples=(
        "--model=runs/recurrent",
        "--model=runs/recurrent --kinds=recurrence,spectral_radius",
        "--model=runs/recurrent --step=best --num_steps=64 --output=figures",
    ),
    old_names=OLD_MODEL_NAMES | OLD_OUTPUT,
)


@dataclasses.dataclass(frozen=True)
class CompareOptions:
    """Which runs are compared by what, and where the plot goes."""

    model: tuple[str, ...] = option(
        (),
        "Folders of finished runs, or LABEL=FOLDER,FOLDER: the mean and range of runs that differ "
        "in their seed; --model may be left out.",
    )
    metric: str | None = option(
        None,
        "Metric to compare. Default (None): exact_accuracy if all runs are of reasoning tasks, "
        "otherwise loss.",
        choices=("loss", "accuracy", "exact_accuracy"),
    )
    output: str = option("depth.png", "File for the plot; its suffix selects the format.")

    def __post_init__(self) -> None:
        check_options(self)

    @rule("model")
    def _runs_are_named(self) -> None:
        """At least one."""
        if not self.model:
            raise ConfigError("model", "is missing; give folders of runs, as runs/a runs/b.")


def compare(parsed: Parsed) -> None:
    """Reads the runs' depth_table.json files, prints the table and writes the plot."""
    from megatransformer_jax.evaluation.depth_table import (  # noqa: PLC0415
        METRICS,
        default_metric,
        markdown_table,
        parse_groups,
        plot_curves,
        plot_formats,
        read_curve,
    )

    options: CompareOptions = parsed.options
    groups = [
        (label, [as_path("model", name) for name in names])
        for label, names in parse_groups(options.model)
    ]
    metric = options.metric or default_metric([path for _, paths in groups for path in paths])
    curves = [read_curve(paths, metric, label) for label, paths in groups]
    path = local_path("output", options.output)
    if not path.parent.is_dir():
        raise ConfigError("output", f"folder {path.parent} does not exist; make it first.")
    if path.suffix.removeprefix(".") not in plot_formats():
        raise ConfigError(
            "output",
            f"{path}: {path.suffix!r} is not a format of plots; end the name in one of "
            f".{', .'.join(plot_formats())}.",
        )
    print(f"{METRICS[metric]}\n")
    print(markdown_table(curves))
    plot_curves(curves, metric).savefig(path, dpi=120)
    print(f"plot: {path}")


COMPARE = Command(
    name="compare",
    doc="Compares finished runs by depth: a Markdown table on the screen and a plot in a file.",
    options=CompareOptions,
    run=compare,
    examples=(
        "runs/reasoning runs/reasoning_diagonal --output=depth.png",
        "looped=runs/seed_0,runs/seed_1,runs/seed_2 plain=runs/plain --metric=loss",
    ),
    repeated=("model",),
    words="model",
)


# ------------------------------------------------------------------------------
# The table of commands.


def _generate() -> Command:
    from megatransformer_jax.cli.generate import COMMAND  # noqa: PLC0415

    return COMMAND


def _evaluate() -> Command:
    from megatransformer_jax.cli.evaluate import COMMAND  # noqa: PLC0415

    return COMMAND


def _prepare() -> Command:
    from megatransformer_jax.cli.prepare import COMMAND  # noqa: PLC0415

    return COMMAND


def _calibrate() -> Command:
    from megatransformer_jax.cli.calibrate import COMMAND  # noqa: PLC0415

    return COMMAND


def _quantize() -> Command:
    from megatransformer_jax.cli.quantize import COMMAND  # noqa: PLC0415

    return COMMAND


def _export_program() -> Command:
    from megatransformer_jax.cli.export_program import COMMAND  # noqa: PLC0415

    return COMMAND


def _compile() -> Command:
    from megatransformer_jax.cli.compile import COMMAND  # noqa: PLC0415

    return COMMAND


def _serve() -> Command:
    from megatransformer_jax.cli.serve import COMMAND  # noqa: PLC0415

    return COMMAND


def _run_lm_eval(arguments: Sequence[str]) -> None:
    """lm-eval has its own parser."""
    # Hugging Face's libraries read this when they are imported.
    if "--online" not in arguments:
        offline = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE")
        os.environ.update(dict.fromkeys(offline, "1"))
    import_extra("lm_eval", "eval", "megatransformer lm-eval")
    from megatransformer_jax.cli.lm_eval import run  # noqa: PLC0415

    run(arguments)


_LM_EVAL = "lm-eval"
# A line for the overview, and the command.
COMMANDS: dict[str, tuple[str, Callable[[], Command]]] = {
    "train": ("Trains a model, resuming if the workdir has a checkpoint.", lambda: TRAIN),
    "generate": ("Continues prompts, at any depth and by any decoding strategy.", _generate),
    "serve": ("Serves a model over HTTP, by OpenAI's API, with a page to try it.", _serve),
    "evaluate": ("Scores a model at several depths.", _evaluate),
    "calibrate": ("Finds thresholds for exits that keep the accuracy.", _calibrate),
    "inspect": ("Shows parameters, memory and FLOPs of a run before it starts.", lambda: INSPECT),
    "compile": ("Compiles a run for TPUs that are not here, and reads the programs.", _compile),
    "prepare": ("Tokenises and packs the data of a run once.", _prepare),
    "find-lr": ("Suggests a learning rate.", lambda: FIND_LR),
    "diagnose": ("Draws figures of what happens inside a model.", lambda: DIAGNOSE),
    "compare": ("Compares finished runs by depth.", lambda: COMPARE),
    "average": ("Averages checkpoints.", lambda: AVERAGE),
    "prune": ("Deletes checkpoints.", lambda: PRUNE),
    "quantize": ("Rounds the weights of a model to 8 or 4 bits.", _quantize),
    "export": ("Writes a model in another project's format.", lambda: EXPORT),
    "export-program": ("Writes a model as StableHLO or ONNX programs.", _export_program),
}
SUMMARIES = {name: summary for name, (summary, _) in COMMANDS.items()} | {
    _LM_EVAL: "Runs tasks of EleutherAI's lm-eval."
}


if __name__ == "__main__":
    main()
