"""Reads the model of a finished run that trains one medium without text."""

import pathlib
from collections.abc import Callable
from typing import Any

import jax

from experiments.load_model import find_step, parse_step, read_config
from experiments.run_kinds.medium_run import abstract_state
from megatransformer_jax.checkpoints.manager import CheckpointManager
from megatransformer_jax.config.loop import MeshConfig
from megatransformer_jax.config.option import UserError
from megatransformer_jax.config.run import RunConfig
from megatransformer_jax.models.medium_model import MediumModel
from megatransformer_jax.sharding.mesh import make_mesh
from megatransformer_jax.sharding.rules import Sharder
from megatransformer_jax.training.evaluation_params import restore_judged_params
from megatransformer_jax.training.optimizers import build_optimizer


def load_medium_run(
    workdir: str,
    kind: str,
    make_model: Callable[[RunConfig], MediumModel],
    step: str | int = "latest",
) -> tuple[RunConfig, Any]:
    """The configuration and the parameters that the run is judged by, on the first local device.

    Args:
      workdir: of the run; nothing in it is changed.
      kind: what it must have trained.
      make_model: from the configuration.
      step: latest, best, or the number of a checkpoint.

    Raises:
      UserError: if there is no such run or checkpoint, or it is of another kind.
    """
    folder = pathlib.Path(workdir).expanduser()
    if not (folder / "checkpoints").is_dir():
        raise UserError(
            f"{folder} is not the workdir of a run (a folder checkpoints/ in it). Train one: "
            f"python -m experiments.train --config=experiments/configs/{kind}.py"
        )
    checkpoints = CheckpointManager(folder / "checkpoints", None)
    try:
        number = find_step(checkpoints, parse_step(step))
        where = checkpoints.directory / str(number)
        config = read_config(checkpoints.run_info(number)["config"], where, kind)
        optimizer = build_optimizer(config.optimizer, config.train.steps, config.train.ema_decay)
        sharder = Sharder(make_mesh(MeshConfig(data=1), jax.local_devices()[:1]))
        state = abstract_state(make_model(config), optimizer, sharder)
        return config, restore_judged_params(checkpoints, number, state, config)
    finally:
        checkpoints.close()
