"""A training step for models whose loss is a function of parameters, batch and key alone."""

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Key

from megatransformer_jax.training.accumulation import sum_micro_batches
from megatransformer_jax.training.state import TrainState
from megatransformer_jax.training.step_keys import step_keys
from megatransformer_jax.training.update import Metrics, update_state

LossStep = Callable[[TrainState, Any], tuple[TrainState, Metrics]]


@runtime_checkable
class Loss(Protocol):
    """Pure and differentiable in its first argument."""

    def __call__(
        self, params: Any, batch: Any, key: Key[Array, ""]
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        """The mean over the rows of the batch, and further means by the name of their metric."""


def make_loss_step(
    loss: Loss, optimizer: optax.GradientTransformation, accumulation: int = 1
) -> LossStep:
    """Builds the step; jit it with a donated state.

    Args:
      loss: what is minimised.
      optimizer: for the whole tree of parameters.
      accumulation: micro-batches that make one step; divides the rows of a batch.

    Returns:
      (state, batch) -> (state, metrics); metrics are those of `update_state` and of the loss.
    """

    def share(params: Any, part: Any, key: jax.Array) -> tuple[jax.Array, tuple[jax.Array, Any]]:
        value, terms = loss(params, part, key)
        value, terms = jax.tree.map(lambda mean: mean / accumulation, (value, terms))
        return value, (value, terms)

    def step(state: TrainState, batch: Any) -> tuple[TrainState, Metrics]:
        def of_part(part: Any, key: jax.Array) -> Any:
            return jax.grad(share, has_aux=True)(state.params, part, key)

        key = step_keys(state.key(), state.step).objective
        gradients, (value, terms) = sum_micro_batches(of_part, batch, key, accumulation)
        state, metrics = update_state(state, gradients, value, optimizer)
        return state, metrics | {name: jnp.float32(term) for name, term in terms.items()}

    return step
