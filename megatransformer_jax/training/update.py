"""The half of a training step after the gradients, the same whatever was differentiated."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from megatransformer_jax.config.fine_tuning import TRAIN_ALL, FineTuningConfig
from megatransformer_jax.training.state import TrainState
from megatransformer_jax.training.statistics import update_statistics, without_statistics
from megatransformer_jax.training.trainable import join_params, split_params

Metrics = dict[str, jax.Array]


def update_state(
    state: TrainState,
    gradients: Any,
    loss: Float[Array, ""],
    optimizer: optax.GradientTransformation,
    *,
    fine_tuning: FineTuningConfig = TRAIN_ALL,
    statistics_momentum: float = 0.0,
) -> tuple[TrainState, Metrics]:
    """The state after one step, and what the update itself has to report.

    If the loss or any gradient is not finite, parameters and optimiser state stay as they were and
    the step is counted as skipped. Frozen parameters come out as they went in.

    Args:
      state: before the step.
      gradients: of the trained parameters; those of running statistics are reports.
      loss: of the whole batch.
      optimizer: makes the updates; it clips.
      fine_tuning: which parameters are trained.
      statistics_momentum: of running statistics among the parameters, if there are any.

    Returns:
      The new state, and float32 scalars: loss, grad_norm (before clipping), skipped_steps,
      skipped_in_row.
    """
    reports, gradients = gradients, without_statistics(gradients)
    norm = optax.tree.norm(gradients)
    is_finite = jnp.isfinite(loss) & jnp.isfinite(norm)
    trained, frozen = split_params(state.params, fine_tuning)
    updates, opt_state = optimizer.update(gradients, state.opt_state, trained)
    new_trained = optax.apply_updates(trained, updates)
    new_trained = update_statistics(new_trained, trained, reports, statistics_momentum)
    new_trained = _choose(is_finite, new_trained, trained)
    skipped = jnp.where(is_finite, 0, 1).astype(jnp.int32)
    new_state = TrainState(
        step=state.step + 1,
        params=join_params(new_trained, frozen),
        opt_state=_choose(is_finite, opt_state, state.opt_state),
        key_data=state.key_data,
        skipped_steps=state.skipped_steps + skipped,
        skipped_in_row=(state.skipped_in_row + 1) * skipped,
    )
    return new_state, {
        "loss": loss,
        "grad_norm": norm,
        "skipped_steps": new_state.skipped_steps.astype(jnp.float32),
        "skipped_in_row": new_state.skipped_in_row.astype(jnp.float32),
    }


def _choose(condition: jax.Array, new: Any, old: Any) -> Any:
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), new, old)
