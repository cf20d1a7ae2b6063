"""Rectified flow (arXiv 2209.03003): straight paths from media to noise, and their velocity.

Time runs as in ops/diffusion_schedule.py, from 0, clean, to 1, noise.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from megatransformer_jax.ops.diffusion import per_medium

TIME_DRAWS = ("uniform", "logit_normal")


def flow_noisy(
    clean: Float[Array, "N ..."], noise: Float[Array, "N ..."], time: Float[Array, "N"]
) -> Float[Array, "N ..."]:
    """(1 - t) clean + t noise."""
    t = per_medium(time, clean)
    return (1.0 - t) * clean + t * noise


def flow_velocity(
    clean: Float[Array, "N ..."], noise: Float[Array, "N ..."]
) -> Float[Array, "N ..."]:
    """noise - clean, the derivative of `flow_noisy` by t: what a network predicts."""
    return noise - clean


def draw_flow_time(draw: str, mean: float, std: float, key: Key[Array, ""]) -> Float[Array, ""]:
    """A time in [0, 1].

    Args:
      draw: 'uniform', or 'logit_normal': the sigmoid of a normal (arXiv 2403.03206), which favours
        the middle.
      mean: of the normal; not used by 'uniform'.
      std: the same.
      key: of the draw.

    Raises:
      ValueError: for a draw that `TIME_DRAWS` does not list.
    """
    match draw:
        case "uniform":
            return jax.random.uniform(key)
        case "logit_normal":
            return jax.nn.sigmoid(mean + std * jax.random.normal(key))
    raise ValueError(f"unknown draw of times {draw!r}; it must be one of {TIME_DRAWS}.")


def euler_step(
    noisy: Float[Array, "N ..."],
    velocity: Float[Array, "N ..."],
    time: Float[Array, ""],
    next_time: Float[Array, ""],
) -> Float[Array, "N ..."]:
    """x + (s - t) velocity: along the flow from time t to s."""
    return noisy + (next_time - time) * velocity


def heun_step(
    noisy: Float[Array, "N ..."],
    velocity: Float[Array, "N ..."],
    next_velocity: Float[Array, "N ..."],
    time: Float[Array, ""],
    next_time: Float[Array, ""],
) -> Float[Array, "N ..."]:
    """Euler's step with the mean of the velocities at both its ends; the second is that where
    Euler's step arrives."""
    return euler_step(noisy, 0.5 * (velocity + next_velocity), time, next_time)


def flow_times(num_steps: int) -> Float[Array, "steps"]:
    """Times 1 > ... > 0 between which a sampler steps, [num_steps + 1]."""
    return jnp.linspace(1.0, 0.0, num_steps + 1)
