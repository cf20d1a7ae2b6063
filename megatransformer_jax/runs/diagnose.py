"""Draws the diagnostics of a checkpoint."""

import dataclasses
import pathlib
from collections.abc import Sequence

import jax
from absl import logging

from megatransformer_jax.config.loop import DIAGNOSTIC_KINDS, DiagnosticsConfig
from megatransformer_jax.config.option import ConfigError
from megatransformer_jax.config.run import RunConfig
from megatransformer_jax.data.media.records import MediaFormats
from megatransformer_jax.data.pipeline import validation_batches
from megatransformer_jax.evaluation.diagnostics.kinds import (
    Diagnoser,
    Moment,
    Subject,
    kinds_of,
    make_subject,
    write_images,
    write_scalars,
)
from megatransformer_jax.runs.load import LoadedModel, foreign_format, load_model, read_run_config
from megatransformer_jax.runs.workdir import use_compilation_cache
from megatransformer_jax.sharding.rules import Sharder
from megatransformer_jax.storage import AnyPath, as_path, make_and_probe, write_into

_DRAWS = "depth_draws"


def diagnose_run(
    source: AnyPath,
    *,
    step: str,
    kinds: Sequence[str],
    num_rows: int,
    num_steps: int | None,
    output: str | None,
) -> AnyPath:
    """Writes figures and numbers of a run's checkpoint.

    Args:
      source: workdir of the run.
      step: which checkpoint, see `load_model`.
      kinds: which; empty: all that the model has.
      num_rows: as `diagnostics.num_rows`.
      num_steps: as `diagnostics.num_steps`.
      output: folder. None: diagnostics/step_<step> in the workdir.

    Returns:
      The folder with the files.

    Raises:
      UserError: if the folder is not a run, or an option does not fit it.
    """
    if (foreign := foreign_format(source)) is not None:
        raise ConfigError(
            "model",
            f"{source} is a {foreign.title} folder, which has no data to look at; name a run.",
        )
    config = _with_options(read_run_config(source), kinds, num_rows, num_steps)
    use_compilation_cache(config.compilation_cache_dir)
    loaded = load_model(source, step=step)
    logging.info("%s", loaded.description)
    subject = _subject(config, loaded)
    chosen = [kind for kind in kinds_of(subject) if kind != _DRAWS]
    diagnoser = Diagnoser(subject, chosen)
    # Gradients are those of training, so of parameters that are not rounded.
    moment = Moment(
        jax.device_put(loaded.params), key_data=None, step=config.train.steps, previous=0
    )
    findings = diagnoser.present(diagnoser.measure(moment), moment)
    named = as_path("output", output or source / "diagnostics" / f"step_{step}")
    folder = make_and_probe("output", named)

    def write(local: pathlib.Path) -> list[pathlib.Path]:
        write_images(findings, local)
        write_scalars(findings, local / "scalars.json")
        return []

    write_into(folder, write)
    return folder


def _with_options(
    config: RunConfig, kinds: Sequence[str], num_rows: int, num_steps: int | None
) -> RunConfig:
    if _DRAWS in kinds:
        others = ", ".join(kind for kind in DIAGNOSTIC_KINDS if kind != _DRAWS)
        raise ConfigError("kinds", f"{_DRAWS!r} is for a run that is going on; known: {others}.")
    try:
        # Some interval, as the options mean nothing without one; it is not read here.
        options = DiagnosticsConfig(1, tuple(kinds), num_rows, num_steps)
        return dataclasses.replace(config, diagnostics=options)
    except ConfigError as error:
        raise ConfigError(error.path.removeprefix("diagnostics."), error.problem) from None


def _subject(config: RunConfig, loaded: LoadedModel) -> Subject:
    media = MediaFormats.of_model(config.model)
    (batch,) = validation_batches(config.data, loaded.tokenizer, num_batches=1, media=media)
    on_device = jax.device_put(batch, jax.local_devices()[0])
    return make_subject(config, loaded.model, on_device, Sharder())
