"""Finds thresholds of exit criteria for a finished model: `megatransformer calibrate`."""

import dataclasses

from absl import logging

from megatransformer_jax.cli.flags import Command, Parsed
from megatransformer_jax.cli.model_options import (
    OLD_MODEL_NAMES,
    ModelOptions,
    load_chosen_model,
)
from megatransformer_jax.config.option import option, part_of
from megatransformer_jax.config.scoring import CalibrationConfig
from megatransformer_jax.storage import as_path, make_and_probe, write_into


@dataclasses.dataclass(frozen=True)
class CalibrateOptions(CalibrationConfig, ModelOptions):
    """Which model is calibrated, how well, on what, and where the result goes."""

    output: str | None = option(
        None,
        "Folder for calibration.json, made if absent. Default (None): the model's, where "
        "exit_threshold=auto finds it.",
    )

    @property
    def calibration(self) -> CalibrationConfig:
        """How well, which criteria, and on what."""
        return part_of(self, CalibrationConfig)


def calibrate(parsed: Parsed) -> None:
    """Calibrates, prints the table and writes the file.

    Raises:
      UserError: if an option does not fit the model, or a file or folder cannot be used.
    """
    options: CalibrateOptions = parsed.options
    options.check_model_is_named()
    # These import JAX, which takes long.
    from rich.console import Console  # noqa: PLC0415

    from megatransformer_jax.generation.request import (  # noqa: PLC0415
        out_of_memory_is_bad_input,
    )
    from megatransformer_jax.runs.calibrate import calibrate as search  # noqa: PLC0415

    loaded = load_chosen_model(options)
    folder = None
    # A model of the hub has no folder here.
    if options.output is not None or options.folder.is_dir():
        output = options.output or options.folder
        folder = make_and_probe("output", as_path("output", output))
    with out_of_memory_is_bad_input():
        report, _ = search(loaded, options.calibration)
    Console().print(report.tables[0])
    if folder is not None:
        for path in write_into(folder, report.write):
            logging.info("written: %s", path)


COMMAND = Command(
    name="calibrate",
    doc="""Finds for each exit criterion the cheapest threshold that keeps the accuracy.

Accuracy is that of exact answers to problems. On text it is how often the likeliest next token is
the one of the full depth. Thresholds are tried token by token with the cache, as generation uses
them, on the run's validation data or on files. The table goes to stdout, and the thresholds go to
calibration.json in the run's folder, where --exit_threshold=auto of generate, evaluate and serve
finds them.""",
    options=CalibrateOptions,
    run=calibrate,
    examples=(
        "--model=runs/recurrent --accuracy=0.99 --num_batches=4",
        "--model=runs/reasoning --depth=32 --criteria=latent_diff,margin",
        "--model=my/huginn --files=my/book.txt --num_batches=2 --output=runs/huginn_exits",
    ),
    old_names=OLD_MODEL_NAMES,
)
