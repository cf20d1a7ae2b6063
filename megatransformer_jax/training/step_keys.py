"""The randomness of a step, from the run's key and the step's number alone."""

from typing import NamedTuple

import jax
from jaxtyping import Array, Int, Key


class StepKeys(NamedTuple):
    """Keys of one step."""

    depth: Key[Array, ""]  # draws of depth
    objective: Key[Array, ""]  # first states, dropout, and the rest


def step_keys(run_key: Key[Array, ""], step: Int[Array, ""] | int) -> StepKeys:
    """The keys of the step that comes after `step` steps.

    A function of its own, so that what a step drew can be told afterwards.
    """
    depth, objective = jax.random.split(jax.random.fold_in(run_key, step))
    return StepKeys(depth, objective)
