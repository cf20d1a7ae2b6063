"""Calibrates a finished model: thresholds of its exit criteria, from its validation data."""

import functools
import math
import pathlib
from collections.abc import Sequence
from typing import Any

from rich.progress import Progress
from rich.table import Table

from megatransformer_jax.config.calibration import CALIBRATION_FILE, Calibration
from megatransformer_jax.config.option import ConfigError, UserError
from megatransformer_jax.config.scoring import CalibrationConfig
from megatransformer_jax.evaluation.calibration import Exits, ExitScores, Search
from megatransformer_jax.evaluation.lens import traced_criteria
from megatransformer_jax.evaluation.report import Report
from megatransformer_jax.nn.kv_cache import check_can_continue
from megatransformer_jax.runs.evaluate import evaluation_batches, make_progress, state_key
from megatransformer_jax.runs.load import LoadedModel
from megatransformer_jax.storage import write_json


def calibrate(
    loaded: LoadedModel, config: CalibrationConfig, *, progress: Progress | None = None
) -> tuple[Report, Calibration]:
    """Finds for each criterion the cheapest threshold that keeps the accuracy.

    Args:
      loaded: a model with a core, on one device.
      config: how well, which criteria, and on what.
      progress: shows how far it is. None: a bar on stderr, if that is a terminal.

    Returns:
      The table, whose `write` puts `CALIBRATION_FILE` into a folder, and the thresholds.

    Raises:
      UserError: if an option does not fit the model, or data cannot be read.
    """
    check_can_continue(loaded.config)
    depth, names = _depth(loaded, config), _criteria(loaded, config)
    task = "text" if config.files else loaded.task
    if task == "media":
        raise UserError(
            f"{loaded.description} was trained on media, and exits are judged on text and "
            "problems; name texts in files."
        )
    batches = evaluation_batches(config.scoring, loaded)
    key = state_key(config.scoring, loaded.run_config)
    progress = progress or make_progress()
    with progress:
        shown = progress.add_task("calibrating", total=1 + len(names))
        search = Search(
            loaded.model,
            loaded.weights,
            batches,
            depth,
            key,
            has_answers=task == "reasoning",
            names=names,
        )
        progress.advance(shown)
        found = []
        for name in names:
            found.append(search.find(name, config.accuracy))
            progress.advance(shown)
    thresholds = {exits.criterion: exits.threshold for exits in found if exits.threshold}
    calibration = Calibration(depth, config.accuracy, thresholds)
    measure = "exact answers" if task == "reasoning" else "as at full depth"
    return _report(loaded, config, depth, search.full, found, measure), calibration


def _depth(loaded: LoadedModel, config: CalibrationConfig) -> int:
    if loaded.trained_depth is None:
        raise UserError(f"{loaded.description} has no recurrent core, so no token can exit early.")
    depth = config.depth or loaded.trained_depth
    if depth < 2:
        raise ConfigError("depth", f"{depth} leaves nothing to save; give 2 or more.")
    return depth


def _criteria(loaded: LoadedModel, config: CalibrationConfig) -> tuple[str, ...]:
    known = traced_criteria(loaded.config.exit_gate.enabled)
    for name in config.criteria:
        if name not in known:
            raise ConfigError(
                "criteria",
                f"{name!r} needs a model with an exit gate (model.exit_gate.enabled in training), "
                "and this one has none; leave it out.",
            )
    return config.criteria or known


def _report(
    loaded: LoadedModel,
    config: CalibrationConfig,
    depth: int,
    full: ExitScores,
    found: Sequence[Exits],
    measure: str,
) -> Report:
    table = Table(title=f"Cheapest exits that keep {config.accuracy:g} of the accuracy")
    for heading in ("criterion", "threshold", "iterations", measure):
        table.add_column(heading, justify="left" if heading == "criterion" else "right")
    rows = []
    for exits in (Exits("fixed", math.nan, full), *found):
        is_fixed, scores = exits.criterion == "fixed", exits.scores
        threshold = None if is_fixed else exits.threshold
        cells = ["-" if threshold is None else f"{threshold:g}", "-", "-"]
        if scores is not None:
            cells[1:] = [f"{scores.mean_steps:.2f}", f"{scores.accuracy:.4f}"]
        table.add_row(f"none (depth {depth})" if is_fixed else exits.criterion, *cells)
        rows.append(
            {
                "criterion": exits.criterion,
                "threshold": threshold,
                "mean_steps": None if scores is None else scores.mean_steps,
                "accuracy": None if scores is None else scores.accuracy,
            }
        )
    step, weights = loaded.checkpoint or (None, None)
    made_for = {"step": step, "weights": weights, "depth": depth, "accuracy": config.accuracy}
    values: dict[str, Any] = {**made_for, "measure": measure, "rows": rows[1:]}
    return Report(rows, [table], functools.partial(_write, values=values))


def _write(folder: pathlib.Path, values: dict[str, Any]) -> list[pathlib.Path]:
    path = pathlib.Path(folder, CALIBRATION_FILE)
    write_json(path, values)
    return [path]
