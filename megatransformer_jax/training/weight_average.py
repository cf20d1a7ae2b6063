"""An exponential average of the weights, kept beside the optimiser's state."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax


class WeightAverageState(NamedTuple):
    """State of `average_weights`."""

    inner_state: Any
    average: Any  # tree of the parameters
    count: Any  # int32 [], updates so far


def average_weights(
    inner: optax.GradientTransformation, decay: jax.typing.ArrayLike
) -> optax.GradientTransformationExtraArgs:
    """Runs `inner` and averages the weights that its updates lead to.

    After update t: average += (1 - d) (weights - average) with d = min(decay, (1 + t) / (10 + t)).
    The average starts as the initial weights; the smaller decay of early steps makes it forget
    them (after 10 updates they weigh 6e-5), so that it can be used at any time without a
    correction.

    Being part of the optimiser's state, the average is left alone where a step is skipped, and it
    is saved, restored and sharded with it.

    Args:
      inner: what makes the updates.
      decay: in (0, 1); the average looks back over about 1 / (1 - decay) updates.

    Example:
      >>> optimizer = average_weights(optax.adamw(1e-3), decay=0.999)
      >>> state = optimizer.init({"kernel": jnp.ones((2, 2))})
      >>> state.average["kernel"].shape
      (2, 2)
    """
    inner = optax.with_extra_args_support(inner)

    def init(params: Any) -> WeightAverageState:
        # A copy: a donated train state may not hold one buffer twice.
        average = jax.tree.map(jnp.copy, params)
        return WeightAverageState(inner.init(params), average, jnp.zeros([], jnp.int32))

    def update(
        updates: Any, state: WeightAverageState, params: Any = None, **extra_args: Any
    ) -> tuple[Any, WeightAverageState]:
        if params is None:
            raise ValueError("averaging needs the parameters: update(updates, state, params)")
        updates, inner_state = inner.update(updates, state.inner_state, params, **extra_args)
        count = optax.safe_increment(state.count)
        kept = jnp.minimum(decay, (1.0 + count) / (10.0 + count))
        average = jax.tree.map(
            lambda mean, p: mean + ((1.0 - kept) * (p - mean)).astype(mean.dtype),
            state.average,
            optax.apply_updates(params, updates),
        )
        return updates, WeightAverageState(inner_state, average, count)

    return optax.GradientTransformationExtraArgs(init, update)
