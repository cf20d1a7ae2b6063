"""Which parameters a run is judged by, in validation, samples and tables, and from a checkpoint."""

from typing import Any, Literal

import jax
import optax

from megatransformer_jax.checkpoints.manager import UNREAD, CheckpointManager
from megatransformer_jax.config.run import RunConfig
from megatransformer_jax.config.run_base import BaseRunConfig
from megatransformer_jax.models.adaptation import model_params
from megatransformer_jax.models.megatransformer import MegaTransformer
from megatransformer_jax.sharding.rules import Sharder
from megatransformer_jax.training.optimizers import build_optimizer
from megatransformer_jax.training.state import TrainState, init_state, state_shardings
from megatransformer_jax.training.trainable import join_params, keep_statistics, split_params
from megatransformer_jax.training.transforms import WeightAverageState

# ------------------------------------------------------------------------------
# Of a train state.

_AVERAGING = (WeightAverageState, optax.contrib.ScheduleFreeState)


def evaluates_an_average(config: BaseRunConfig) -> bool:
    """Whether the parameters to judge by are others than those being trained."""
    return config.train.ema_decay is not None or config.optimizer.is_schedule_free


def evaluation_params(state: TrainState, config: BaseRunConfig) -> Any:
    """The tree that `model.apply` takes for evaluation.

    Everything that looks at a state from outside the step asks here, so that what training keeps
    (averages of weights, adapters next to them) has one place where it becomes a model.

    With `train.ema_decay` it is that average, with a schedule-free optimiser its sequence x, else
    the trained parameters. Frozen parameters are what they are, LoRA's updates are added.
    """
    if not evaluates_an_average(config):
        return merged_params(state.params, config)
    latest, frozen = split_params(state.params, config.trained_parts)
    averaging = find_average(state.opt_state)
    if isinstance(averaging, WeightAverageState):
        trained = averaging.average
    else:
        trained = _schedule_free_average(averaging.b1, averaging.z, latest)
    trained = keep_statistics(trained, latest)
    return merged_params(join_params(trained, frozen), config)


def merged_params(kept: Any, config: BaseRunConfig) -> Any:
    """The model's parameters from those that a run keeps (`kept_params`)."""
    parts = config.trained_parts
    return _merge(kept, parts) if parts.lora.rank else kept


_merge = jax.jit(model_params, static_argnums=1)


def find_average(opt_state: Any) -> Any:
    """The part of an optimiser's state that holds the average.

    Raises:
      ValueError: if there is none, or more than one.
    """
    nodes = jax.tree.leaves(opt_state, is_leaf=lambda node: isinstance(node, _AVERAGING))
    found = [node for node in nodes if isinstance(node, _AVERAGING)]
    if len(found) != 1:
        raise ValueError(f"the optimiser's state has {len(found)} averages of weights, not 1")
    return found[0]


@jax.jit
def _schedule_free_average(b1: jax.Array, z: Any, params: Any) -> Any:
    """x from y = (1 - b1) z + b1 x, where y are the parameters that are trained."""
    return jax.tree.map(lambda yi, zi: (yi - (1.0 - b1) * zi) / b1, params, z)


# ------------------------------------------------------------------------------
# Of a checkpoint.


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
    config: BaseRunConfig,
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
    # Frozen parameters and running statistics come from the parameters even if there is an average.
    return unread(state).replace(params=state.params, opt_state=opt_state)
