"""Which parameters a state is judged by, in validation, samples and tables."""

from typing import Any

import jax
import optax

from megatransformer_jax.config.run import RunConfig
from megatransformer_jax.models.adaptation import model_params
from megatransformer_jax.training.state import TrainState
from megatransformer_jax.training.statistics import keep_statistics
from megatransformer_jax.training.trainable import join_params, split_params
from megatransformer_jax.training.weight_average import WeightAverageState

_AVERAGING = (WeightAverageState, optax.contrib.ScheduleFreeState)


def evaluates_an_average(config: RunConfig) -> bool:
    """Whether the parameters to judge by are others than those being trained."""
    return config.train.ema_decay is not None or config.optimizer.is_schedule_free


def evaluation_params(state: TrainState, config: RunConfig) -> Any:
    """The tree that `model.apply` takes for evaluation.

    Everything that looks at a state from outside the step asks here, so that what training keeps
    (averages of weights, adapters beside them) has one place where it becomes a model.

    With `train.ema_decay` it is that average, with a schedule-free optimiser its sequence x, else
    the trained parameters. Frozen parameters are what they are, LoRA's updates are added.
    """
    if not evaluates_an_average(config):
        return merged_params(state.params, config)
    latest, frozen = split_params(state.params, config.fine_tuning)
    averaging = find_average(state.opt_state)
    if isinstance(averaging, WeightAverageState):
        trained = averaging.average
    else:
        trained = _schedule_free_average(averaging.b1, averaging.z, latest)
    trained = keep_statistics(trained, latest)
    return merged_params(join_params(trained, frozen), config)


def merged_params(kept: Any, config: RunConfig) -> Any:
    """The model's parameters from those that a run keeps (`kept_params`)."""
    return _merge(kept, config.fine_tuning) if config.fine_tuning.lora.rank else kept


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
