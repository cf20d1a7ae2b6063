"""Writes a model's programs for other runtimes: `megatransformer export-program`."""

import dataclasses
import pathlib
import sys

from megatransformer_jax.cli.flags import Command, Parsed
from megatransformer_jax.cli.model_options import (
    OLD_MODEL_NAMES,
    ModelOptions,
    load_chosen_model,
)
from megatransformer_jax.config.exporting import ProgramConfig
from megatransformer_jax.config.option import ConfigError, option, rule
from megatransformer_jax.extras import import_extra

# A pipe or a file has no width, and a table should not be cut there.
_PLAIN_WIDTH = 140
_OF_PROGRAM = tuple(field.name for field in dataclasses.fields(ProgramConfig))


@dataclasses.dataclass(frozen=True)
class ExportProgramOptions(ProgramConfig, ModelOptions):
    """Which model becomes which program, and where it goes."""

    output: str | None = option(None, "Folder to make; must be given.")

    @rule("output")
    def _output_is_named(self) -> None:
        """Must be given."""
        if self.output is None:
            raise ConfigError("output", "is missing; give the folder to make.")


def export_program(parsed: Parsed) -> None:
    """Exports the model that the command line names, and prints what was written or found.

    Raises:
      UserError: if an option does not fit the model, or a package or folder cannot be used.
    """
    options: ExportProgramOptions = parsed.options
    options.check_model_is_named()
    assert options.output is not None  # A rule says so.
    output = pathlib.Path(options.output).expanduser()
    # These import JAX, which takes long.
    from rich.console import Console  # noqa: PLC0415

    from megatransformer_jax.export.folder import check_output  # noqa: PLC0415
    from megatransformer_jax.export.folder import export_program as write  # noqa: PLC0415

    check_output(output)
    if options.format == "onnx":
        import_extra("onnx", "export", "format='onnx'")
    config = ProgramConfig(**{name: getattr(options, name) for name in _OF_PROGRAM})
    report = write(load_chosen_model(options), output, config)
    console = Console()
    if not console.is_terminal:
        console.width = _PLAIN_WIDTH
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
