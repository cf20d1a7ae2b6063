"""Applies rules of retention to a workdir that exists."""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

from experiments.workdir_lock import hold_workdir
from megatransformer_jax.checkpoints.manager import CheckpointManager, Ranking
from megatransformer_jax.config.build import build
from megatransformer_jax.config.option import ConfigError, UserError


@dataclasses.dataclass(frozen=True)
class Pruned:
    """What pruning did or would do.

    Attributes:
      deleted: bytes on disk by step.
      kept: the steps that stay, ascending.
    """

    deleted: dict[int, int]
    kept: list[int]


def prune_checkpoints(
    workdir: pathlib.Path, rules: Mapping[str, Any], *, is_dry_run: bool
) -> Pruned:
    """Deletes the checkpoints of a run that no rule keeps.

    Args:
      workdir: of the run.
      rules: options of `CheckpointConfig` in place of those of the run.
      is_dry_run: changes nothing; the run may go on.

    Raises:
      UserError: if there is no checkpoint, a rule has a value that is not allowed, or a run is
        writing to the workdir.
    """
    folder = workdir / "checkpoints"
    reader = CheckpointManager(folder, None)
    try:
        steps = reader.steps()
        if not steps:
            raise UserError(f"{folder} has no complete checkpoint; there is nothing to prune.")
        config = build(reader.run_info(steps[-1])["config"])
        try:
            checkpoint = dataclasses.replace(config.checkpoint, **rules)
        except ConfigError as error:
            raise UserError(f"--{error.path}: {error.problem}") from error
        ranking = Ranking.from_config(checkpoint)
        if "best_metric" in rules and not reader.best_steps(ranking, 1):
            raise UserError(
                f"--best_metric={ranking.metric}: no checkpoint of {folder} has a finite one; name "
                "another, or leave it out."
            )
        planned = reader.prune(checkpoint, is_dry_run=True)
    finally:
        reader.close()
    kept = [step for step in steps if step not in planned]
    if is_dry_run:
        return Pruned(planned, kept)
    with hold_workdir(workdir):
        # Opened only now: it also removes what a killed run left half written.
        manager = CheckpointManager(folder, checkpoint)
        try:
            return Pruned(manager.prune(checkpoint), manager.steps())
        finally:
            manager.close()
