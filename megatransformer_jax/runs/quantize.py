"""Quantises a finished model: calibration, rounding, the report by depth, the folder."""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
from rich.progress import Progress
from rich.table import Table

from megatransformer_jax.checkpoints.quantized import QuantizedFolder, write_quantized
from megatransformer_jax.config.build import to_dict
from megatransformer_jax.config.option import ConfigError, UserError, require_defaults
from megatransformer_jax.config.quantization import QuantizationConfig
from megatransformer_jax.config.run import RunConfig
from megatransformer_jax.config.scoring import ScoringConfig
from megatransformer_jax.data.batches import first_batches
from megatransformer_jax.data.pipeline import build_pipeline
from megatransformer_jax.evaluation.divergence import divergence_report, measure_divergence
from megatransformer_jax.evaluation.report import Report
from megatransformer_jax.models.megatransformer import param_axes
from megatransformer_jax.models.passes.calibration import (
    MomentsByPath,
    add_moments,
    input_moments,
)
from megatransformer_jax.models.quantization import (
    is_quantized_model,
    quantize_weights,
    quantized_paths,
)
from megatransformer_jax.nn.quantized import is_quantized_matrix
from megatransformer_jax.runs.checkpoint_tools import describing_run, write_tokenizer
from megatransformer_jax.runs.evaluate import (
    evaluation_batches,
    evaluation_depths,
    make_progress,
    state_key,
)
from megatransformer_jax.runs.load import LoadedModel
from megatransformer_jax.runs.workdir import check_empty, make_folder
from megatransformer_jax.types import Batch

# ------------------------------------------------------------------------------
# The model.


def quantize_model(
    loaded: LoadedModel, config: QuantizationConfig, *, progress: Progress | None = None
) -> LoadedModel:
    """The model with quantised matrices; the original stays as it is.

    Args:
      loaded: a float model.
      config: how.
      progress: shows how far the calibration is. None: a bar on stderr, if that is a terminal.

    Raises:
      UserError: if the model is quantised already, a pattern fits nothing, qwix is not installed,
        or the method needs data and there is none.
    """
    if is_quantized_model(loaded.params):
        raise UserError(
            f"{loaded.description} is quantised already; quantise the model it was made from."
        )
    axes = param_axes(loaded.model)
    paths = quantized_paths(axes, config)
    moments = None
    if config.method != "rtn":
        moments = _calibrate(loaded, config, paths, progress or make_progress())
    params = quantize_weights(loaded.model, loaded.params, config, moments)
    return dataclasses.replace(
        loaded,
        params=params,
        description=f"{loaded.description}, {config.weights} by {config.method}",
        quantization=config,
        quantized_from=loaded.description,
    )


def _calibrate(
    loaded: LoadedModel, config: QuantizationConfig, paths: tuple[str, ...], progress: Progress
) -> MomentsByPath:
    key, total = jax.random.key(config.seed), None
    with progress:
        task = progress.add_task("calibrating", total=config.calibration_batches)
        for number, batch in enumerate(_calibration_batches(loaded, config)):
            on_device = jax.device_put(batch, jax.local_devices()[0])
            batch_key = jax.random.fold_in(key, number)
            more = input_moments(loaded.model, loaded.weights, on_device, batch_key, paths)
            total = add_moments(total, more)
            progress.advance(task)
    if total is None:
        raise UserError("the calibration data has no text; name other calibration_files.")
    return total


def _calibration_batches(loaded: LoadedModel, config: QuantizationConfig) -> Sequence[Batch]:
    """Text or problems to calibrate on.

    Raises:
      UserError: if there are none, or they cannot be read.
    """
    if config.calibration_files:
        try:
            options = ScoringConfig(
                files=config.calibration_files, num_batches=config.calibration_batches
            )
            return evaluation_batches(options, loaded)
        except ConfigError as error:
            if error.path == "files":
                raise ConfigError("calibration_files", error.problem) from error
            raise
    run = loaded.run_config
    if run is None:
        raise ConfigError(
            "calibration_files",
            f"is missing; method={config.method!r} needs text, and {loaded.description} has no "
            "training data. Name files with text (.txt, .jsonl, .parquet), or use method='rtn'.",
        )
    if loaded.task == "media":
        raise ConfigError(
            "method",
            f"{config.method!r} is for text and problems, and {loaded.description} was trained on "
            "images or sound; use rtn, or name calibration_files with text.",
        )
    with build_pipeline(run.data, loaded.tokenizer, split="train") as batches:
        return first_batches(batches, config.calibration_batches)


# ------------------------------------------------------------------------------
# The report by depth.


def compare_models(
    reference: LoadedModel,
    loaded: LoadedModel,
    options: ScoringConfig,
    *,
    progress: Progress | None = None,
) -> Report:
    """How far a model is from another of the same architecture, at each depth.

    Args:
      reference: what it is compared with.
      loaded: the model; its run says on what data, where `options` do not.
      options: depths, data, seed.
      progress: shows how far it is. None: a bar on stderr, if that is a terminal.

    Raises:
      UserError: if the architectures differ, an option does not fit, or data cannot be read.
    """
    if reference.config != loaded.config:
        raise UserError(
            f"{loaded.description} has another architecture than {reference.description}; only "
            "models of the same one are compared."
        )
    if options.references is not None:
        raise ConfigError("references", "would be ignored, as no text is generated; leave it out.")
    options.reject_media("no media are made")
    require_defaults(options, ("gate_readout", "gate_threshold"), "in a comparison", "leave it out")
    depths = evaluation_depths(options, loaded)
    batches = evaluation_batches(options, loaded)
    progress = progress or make_progress()
    with progress:
        task = progress.add_task("comparing", total=len(batches) * len(depths))
        rows = measure_divergence(
            loaded.model,
            reference.weights,
            loaded.weights,
            [jax.device_put(batch, jax.local_devices()[0]) for batch in batches],
            depths,
            state_key(options, loaded.run_config),
            lambda: progress.advance(task),
        )
    return divergence_report(
        rows,
        loaded.trained_depth,
        of_problems=loaded.task == "reasoning",
        title="Divergence by depth",
    )


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Bytes of parameters.

    Attributes:
      matrices: of the quantised matrices, with their scales.
      matrices_float32: of the same matrices in float32.
      others: of the parameters that stay as they are.
    """

    matrices: int
    matrices_float32: int
    others: int


def sizes(params: Any) -> Sizes:
    """Bytes of a quantised model's parameters."""
    leaves = jax.tree.leaves(params, is_leaf=is_quantized_matrix)
    quantized = [leaf for leaf in leaves if is_quantized_matrix(leaf)]
    return Sizes(
        sum(leaf.nbytes for leaf in quantized),
        sum(4 * leaf.size for leaf in quantized),
        sum(leaf.nbytes for leaf in leaves if not is_quantized_matrix(leaf)),
    )


def size_table(size: Sizes) -> Table:
    """The bytes for people."""
    table = Table("parameters", "float32, bytes", "quantised, bytes", "ratio")
    whole = size.matrices_float32 + size.others, size.matrices + size.others
    for name, before, now in (
        ("quantised matrices", size.matrices_float32, size.matrices),
        ("whole model", *whole),
    ):
        table.add_row(name, f"{before:,}", f"{now:,}", f"{now / before:.4f}")
    return table


# ------------------------------------------------------------------------------
# The folder.


def save_quantized(
    loaded: LoadedModel, folder: pathlib.Path, report: Sequence[dict[str, Any]] = ()
) -> None:
    """Writes a quantised model into a folder that `load_model` reads.

    Args:
      loaded: the model.
      folder: made if absent; it must be empty.
      report: rows to keep with it.

    Raises:
      UserError: if the folder cannot be used.
    """
    check_empty("output", folder)
    assert loaded.quantization is not None and loaded.quantized_from is not None
    run: RunConfig = describing_run(loaded)
    path = make_folder("output", str(folder))
    digest = None if loaded.tokenizer is None else write_tokenizer(loaded.tokenizer, path)
    about = QuantizedFolder(
        loaded.quantization,
        loaded.quantized_from,
        to_dict(run),
        loaded.run_config is not None,
        digest,
        list(report),
    )
    write_quantized(path, loaded.params, about)
