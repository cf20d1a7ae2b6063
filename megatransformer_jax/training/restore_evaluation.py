"""Reads from a checkpoint what the run would be judged by."""

from typing import Any, Literal

import jax
import optax

from megatransformer_jax.checkpoints.manager import UNREAD, CheckpointManager
from megatransformer_jax.config.run import RunConfig
from megatransformer_jax.models.megatransformer import MegaTransformer
from megatransformer_jax.sharding.rules import Sharder
from megatransformer_jax.training.evaluation_params import (
    evaluates_an_average,
    evaluation_params,
    merged_params,
)
from megatransformer_jax.training.optimizers import build_optimizer
from megatransformer_jax.training.state import TrainState, init_state, state_shardings
from megatransformer_jax.training.weight_average import WeightAverageState


def restore_evaluation_params(
    checkpoints: CheckpointManager,
    step: int,
    model: MegaTransformer,
    config: RunConfig,
    sharder: Sharder | None = None,
    weights: Literal["average", "raw"] = "average",
) -> Any:
    """The parameters that `evaluation_params` gives for a saved state.

    Args:
      checkpoints: of the run.
      step: which checkpoint.
      model: of the run; its mesh does not matter.
      config: saved with the checkpoint.
      sharder: with a mesh, which the parameters are placed on. None: on the first local device.
      weights: of a run that averages its weights, 'raw' gives those being trained instead.

    Raises:
      CheckpointMismatch: if the saved arrays have other names or shapes.
      DamagedCheckpoint: if they cannot be read.
    """
    optimizer = build_optimizer(config.optimizer, config.train.steps, config.train.ema_decay)
    shapes = jax.eval_shape(
        lambda key: init_state(model, optimizer, key, fine_tuning=config.fine_tuning),
        jax.random.key(0),
    )
    if sharder is None:
        here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        places = jax.tree.map(lambda _: here, shapes)
    else:
        places = state_shardings(model, optimizer, sharder, fine_tuning=config.fine_tuning)
    abstract = jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        shapes,
        places,
    )
    return restore_judged_params(checkpoints, step, abstract, config, weights)


def restore_judged_params(
    checkpoints: CheckpointManager,
    step: int,
    abstract: TrainState,
    config: RunConfig,
    weights: Literal["average", "raw"] = "average",
) -> Any:
    """The same of a run of any kind, from the shapes, types and shardings of its state."""
    if weights == "raw" or not evaluates_an_average(config):
        return merged_params(checkpoints.restore_params(abstract.params, step), config)
    state = checkpoints.restore_parts(_without_the_rest(abstract), step)
    return evaluation_params(state, config)


def _without_the_rest(state: TrainState) -> TrainState:
    """The state with `UNREAD` in place of all that `evaluation_params` does not look at."""

    def unread(tree: Any) -> Any:
        return jax.tree.map(lambda _: UNREAD, tree)

    def keep_average(node: Any) -> Any:
        match node:
            case WeightAverageState():
                return unread(node)._replace(average=node.average)
            case optax.contrib.ScheduleFreeState():
                return unread(node)._replace(z=node.z, b1=node.b1)
        return UNREAD

    kinds = (WeightAverageState, optax.contrib.ScheduleFreeState)
    opt_state = jax.tree.map(
        keep_average, state.opt_state, is_leaf=lambda node: isinstance(node, kinds)
    )
    # Frozen parameters and running statistics are taken from the parameters also beside an average.
    return unread(state).replace(params=state.params, opt_state=opt_state)
