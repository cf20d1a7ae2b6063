"""Commands on the checkpoints of a run: average, prune, export."""

import dataclasses

from megatransformer_jax.cli.flags import Command, Parsed
from megatransformer_jax.cli.model_options import (
    OLD_MODEL_NAMES,
    ModelOptions,
    check_output_is_named,
    load_chosen_model,
    model_folder,
    model_option,
    output_option,
)
from megatransformer_jax.config.loop import FOREIGN_FORMATS
from megatransformer_jax.config.option import ConfigError, check_options, option, rule
from megatransformer_jax.storage import CHECKPOINTS, NO_CHECKPOINTS, as_path, local_path

# What commands called the folder for their result before all of them said --output.
OLD_OUTPUT = {"out": "output"}


@dataclasses.dataclass(frozen=True)
class AverageOptions:
    """Which checkpoints are averaged, and where the mean goes."""

    model: str | None = model_option()
    output: str | None = output_option()
    last: int | None = option(None, "Averages this many of the newest checkpoints.", minimum=1)
    best: int | None = option(None, "Averages this many of the best checkpoints.", minimum=1)
    steps: tuple[int, ...] = option(
        (), "Averages the checkpoints at these steps, such as 100,200.", minimum=0
    )
    metric: str | None = option(
        None, "Metric that ranks checkpoints. Default (None): checkpoint.best_metric of the run."
    )

    def __post_init__(self) -> None:
        check_options(self)

    @rule("output")
    def _output_is_named(self) -> None:
        """Must be given."""
        check_output_is_named(self.output)

    @rule("last", "best", "steps")
    def _one_way_to_choose(self) -> None:
        """Exactly one of last, best and steps."""
        given = [name for name in ("last", "best", "steps") if getattr(self, name)]
        if len(given) != 1:
            problem = f"does not go together with --{given[0]}" if given else "is missing"
            raise ConfigError(
                given[1] if given else "last", f"{problem}; give one of last, best and steps."
            )


def average(parsed: Parsed) -> None:
    """Averages the checkpoints that the command line names."""
    options: AverageOptions = parsed.options
    folder = model_folder(options.model)
    assert options.output is not None  # A rule says so.
    from megatransformer_jax.runs.checkpoint_tools import average_checkpoints  # noqa: PLC0415

    steps = average_checkpoints(
        folder,
        as_path("output", options.output, CHECKPOINTS, NO_CHECKPOINTS),
        last=options.last,
        best=options.best,
        steps=options.steps or None,
        metric=options.metric,
    )
    print(f"mean of steps {', '.join(map(str, steps))} of {folder} -> {options.output}")


AVERAGE = Command(
    name="average",
    doc="""Averages the parameters of several checkpoints of a run into a folder of their own.

What is averaged is what generate and evaluate would load: the parameters, or their EMA. The new
folder serves as --model of generate, evaluate and export, and to start fine-tuning from. Training
cannot be resumed from it, because it holds no optimiser state. The run needs to have kept enough
checkpoints: see checkpoint.keep_last and checkpoint.keep_best.""",
    options=AverageOptions,
    run=average,
    examples=(
        "--model=runs/mine --last=5 --output=runs/mine_average",
        "--model=runs/mine --best=3 --metric=validation/accuracy --output=runs/b",
        "--model=runs/mine --steps=100,200 --output=runs/c",
    ),
    old_names=OLD_MODEL_NAMES | OLD_OUTPUT,
)


@dataclasses.dataclass(frozen=True)
class PruneOptions:
    """Which checkpoints of which run stay. What is not given is as the run was configured."""

    model: str | None = model_option()
    keep_last: int | None = option(None, "Keeps this many of the newest checkpoints.", minimum=1)
    keep_best: int | None = option(None, "Keeps this many of the best checkpoints.", minimum=0)
    keep_every_steps: int | None = option(
        None, "Keeps checkpoints at multiples of this step.", minimum=1
    )
    best_metric: str | None = option(
        None, "Metric that ranks checkpoints for keep_best, such as validation/accuracy."
    )
    best_mode: str | None = option(
        None, "Whether a high or a low value is better.", choices=("auto", "min", "max")
    )
    dry_run: bool = option(False, "Only shows what would be deleted.")

    def __post_init__(self) -> None:
        check_options(self)


_RETENTION = ("keep_last", "keep_best", "keep_every_steps", "best_metric", "best_mode")


def prune(parsed: Parsed) -> None:
    """Prunes the run that the command line names, or says what would be deleted."""
    options: PruneOptions = parsed.options
    folder = model_folder(options.model)
    if not (folder / "checkpoints").is_dir():
        raise ConfigError("model", f"{folder} has no checkpoints; name the folder of a run.")
    from megatransformer_jax.runs.checkpoint_tools import prune_checkpoints  # noqa: PLC0415

    rules = {name: getattr(options, name) for name in _RETENTION}
    given = {name: value for name, value in rules.items() if value is not None}
    pruned = prune_checkpoints(folder, given, is_dry_run=options.dry_run)
    would_be = "would be " if options.dry_run else ""
    for step, size in pruned.deleted.items():
        print(f"step {step}: {_megabytes(size)} {would_be}deleted")
    freed = _megabytes(sum(pruned.deleted.values()))
    print(f"{freed} {would_be}freed; kept: {', '.join(map(str, pruned.kept))}")


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"


PRUNE = Command(
    name="prune",
    doc="""Deletes checkpoints of a finished or stopped run that the rules of retention do not keep.

The newest checkpoint is always kept. What is not given is as the run was configured
(checkpoint.keep_last and its like). Refused while a run is writing to the folder.""",
    options=PruneOptions,
    run=prune,
    examples=("--model=runs/mine --keep_last=2 --keep_best=1 --dry_run",),
    old_names=OLD_MODEL_NAMES,
)


@dataclasses.dataclass(frozen=True)
class ExportOptions(ModelOptions):
    """What is exported, and how it is stored."""

    output: str | None = output_option()
    format: str = option(
        "huginn",
        "Format of the folder; the model must be one that it can express.",
        choices=FOREIGN_FORMATS,
    )
    max_shard: str = option("5GiB", "Largest size of a file of weights.")
    dtype: str | None = option(
        None,
        "Rounds the weights to this type. Default (None): float32, unchanged.",
        choices=("float32", "bfloat16", "float16"),
    )
    rotary_table: bool = option(
        True,
        "Of format huginn: also stores freqs_cis, which its model class wants among the weights.",
    )
    overwrite: bool = option(False, "Replaces an older export in the same folder.")

    @rule("output")
    def _output_is_named(self) -> None:
        """Must be given."""
        check_output_is_named(self.output)

    @rule("rotary_table")
    def _rotary_table_is_huginns(self) -> None:
        """False only with format='huginn'."""
        if self.format != "huginn" and not self.rotary_table:
            raise ConfigError(
                "rotary_table",
                f"False would be ignored with format={self.format!r}, which stores no such table; "
                "leave it out.",
            )


def export(parsed: Parsed) -> None:
    """Exports the checkpoint that the command line names."""
    options: ExportOptions = parsed.options
    assert options.output is not None  # A rule says so.
    from megatransformer_jax.checkpoints.hub import find_model  # noqa: PLC0415
    from megatransformer_jax.runs.checkpoint_tools import (  # noqa: PLC0415
        check_export,
        export_model,
    )
    from megatransformer_jax.runs.load import foreign_format  # noqa: PLC0415

    output = local_path("output", options.output)
    check_export(output, max_shard=options.max_shard, overwrite=options.overwrite)
    foreign = foreign_format(find_model(options.folder))
    if foreign is not None and foreign.name == options.format:
        raise ConfigError(
            "model", f"{options.folder} is a {foreign.title} folder already; name another format."
        )
    loaded = load_chosen_model(options)
    export_model(
        loaded,
        output,
        max_shard=options.max_shard,
        dtype=options.dtype,
        format=options.format,
        with_rotary_table=options.rotary_table,
        overwrite=options.overwrite,
    )
    print(f"{loaded.description} -> {options.output}")


EXPORT = Command(
    name="export",
    doc="""Writes a checkpoint as a folder of another project's format: config.json and safetensors.

Only models that the format can express are exported; the error lists what differs. A tokenizer that
has a file goes along. megatransformer generate reads the folder as a --model.""",
    options=ExportOptions,
    run=export,
    examples=("--model=runs/mine --output=exported --step=best",),
    old_names=OLD_MODEL_NAMES,
)
