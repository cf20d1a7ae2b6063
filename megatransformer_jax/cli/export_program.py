"""Writes a model's programs for other runtimes: `megatransformer export-program`."""

import dataclasses
import sys

from megatransformer_jax.cli.flags import Command, Parsed
from megatransformer_jax.cli.launch import PLAIN_WIDTH
from megatransformer_jax.cli.model_options import (
    OLD_MODEL_NAMES,
    ModelOptions,
    check_output_is_named,
    load_chosen_model,
    output_option,
)
from megatransformer_jax.config.exporting import ProgramConfig
from megatransformer_jax.config.option import part_of, rule
from megatransformer_jax.extras import import_extra
from megatransformer_jax.runs.workdir import check_empty
from megatransformer_jax.storage import local_path


@dataclasses.dataclass(frozen=True)
class ExportProgramOptions(ProgramConfig, ModelOptions):
    """Which model becomes which program, and where it goes."""

    output: str | None = output_option()

    @rule("output")
    def _output_is_named(self) -> None:
        """Must be given."""
        check_output_is_named(self.output)


def export_program(parsed: Parsed) -> None:
    """Exports the model that the command line names, and prints what was written or found.

    Raises:
      UserError: if an option does not fit the model, or a package or folder cannot be used.
    """
    options: ExportProgramOptions = parsed.options
    options.check_model_is_named()
    assert options.output is not None  # A rule says so.
    output = local_path("output", options.output)
    # These import JAX, which takes long.
    from rich.console import Console  # noqa: PLC0415

    from megatransformer_jax.export.folder import export_program as write  # noqa: PLC0415

    check_empty("output", output)
    if options.format == "onnx":
        import_extra("onnx", "export", "format='onnx'")
    config = part_of(options, ProgramConfig)
    report = write(load_chosen_model(options), output, config)
    console = Console()
    if not console.is_terminal:
        console.width = PLAIN_WIDTH
    for table in report.tables:
        console.print(table)
    if not all(row.get("passed", True) for row in report.rows):
        sys.exit(1)


COMMAND = Command(
    name="export-program",
    doc="""Writes a model as programs that run without this package: StableHLO, or ONNX.

One program reads a chunk of a prompt, the other one token; depth, thresholds and the cache are
inputs. With them go the weights, the tokenizer, program.json and generate.py, a loop in NumPy.
--check runs them next to this package; the exit status is 1 if they differ.""",
    options=ExportProgramOptions,
    run=export_program,
    examples=(
        "--model=runs/recurrent --format=stablehlo --output=program --check",
        "--model=runs/recurrent --format=onnx --criterion=fixed,latent_diff,kl \\\n"
        "      --batch=2 --capacity=512 --cache_slots=16 --output=program",
    ),
    old_names=OLD_MODEL_NAMES,
)
