"""Learning-rate range test (arXiv 1506.01186): from losses at rising rates to a suggestion."""

import dataclasses
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from megatransformer_jax.config.option import UserError

# Decay of the average that losses are smoothed by.
SMOOTHING = 0.9
# The test ends where the smoothed loss is this much above the first, as a share of it.
DIVERGENCE = 0.25


@dataclasses.dataclass(frozen=True)
class RangeTest:
    """What the test has found.

    Attributes:
      learning_rates: of the steps made, rising.
      losses: before each step.
      smoothed: the same, smoothed.
      steepest: rate where the smoothed loss falls fastest.
      minimum: rate where it is lowest.
      suggestion: a tenth of `minimum`: the loss lags behind the rate, and what still works for
        a few steps need not work for a run.
      is_still_falling: whether the lowest loss is the last, so that higher rates might do better.
    """

    learning_rates: tuple[float, ...]
    losses: tuple[float, ...]
    smoothed: tuple[float, ...]
    steepest: float
    minimum: float
    suggestion: float
    is_still_falling: bool


def check_range(start: float, end: float, steps: int) -> None:
    """Checks what a test is asked for.

    Raises:
      UserError: if the rates do not rise from above 0, or the steps are too few to tell.
    """
    if not (math.isfinite(start) and start > 0):
        raise UserError(f"--start={start}: the first learning rate must be above 0.")
    if not (math.isfinite(end) and end > start):
        raise UserError(f"--end={end}: the last learning rate must be above --start={start}.")
    if steps < 10:
        raise UserError(f"--steps={steps} is too few to see a curve; use at least 10.")


def exponential_schedule(
    start: float, end: float, steps: int
) -> Callable[[jax.typing.ArrayLike], jax.Array]:
    """From a step counted from 0 to its rate, float32 []: `start` at the first, `end` at the last.

    The rate grows by the same factor from step to step.
    """
    log_factor = math.log(end / start) / (steps - 1)

    def schedule(step: jax.typing.ArrayLike) -> jax.Array:
        return start * jnp.exp(log_factor * jnp.asarray(step, jnp.float32))

    return schedule


def smooth(losses: Sequence[float], decay: float = SMOOTHING) -> list[float]:
    """Exponential averages, each divided by the sum of its weights, so that the first are right."""
    average, result = 0.0, []
    for count, loss in enumerate(losses, start=1):
        average = decay * average + (1 - decay) * loss
        result.append(average / (1 - decay**count))
    return result


def has_diverged(losses: Sequence[float]) -> bool:
    """Whether the last loss is not finite, or smoothed is well above the first."""
    if not math.isfinite(losses[-1]):
        return True
    return smooth(losses)[-1] > losses[0] + DIVERGENCE * abs(losses[0])


def suggest(learning_rates: Sequence[float], losses: Sequence[float]) -> RangeTest:
    """What the losses of a test say. Losses from the first that is not finite on are left out.

    Raises:
      UserError: if there are fewer than 3, or the loss never falls.
    """
    finite = next((i for i, x in enumerate(losses) if not math.isfinite(x)), len(losses))
    rates, losses = list(learning_rates[:finite]), list(losses[:finite])
    if len(losses) < 3:
        raise UserError(
            f"the loss was finite for {len(losses)} steps only; begin with a lower --start."
        )
    smoothed = smooth(losses)
    lowest = int(np.argmin(smoothed))
    if lowest == 0:
        raise UserError(
            f"the loss never fell below its first value, {losses[0]:.4g}; begin with a lower "
            "--start, or look at the data."
        )
    slopes = np.diff(smoothed[: lowest + 1]) / np.diff(np.log(rates[: lowest + 1]))
    return RangeTest(
        learning_rates=tuple(rates),
        losses=tuple(losses),
        smoothed=tuple(smoothed),
        steepest=rates[int(np.argmin(slopes)) + 1],
        minimum=rates[lowest],
        suggestion=rates[lowest] / 10,
        is_still_falling=lowest == len(losses) - 1,
    )
