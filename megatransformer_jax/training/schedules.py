"""Learning rate as a function of the step.

Every schedule warms up linearly, reaches the peak at the last warmup step and its last value at
the last step of the run, so that the first step already learns and the last one is the smallest.
"""

import jax
import jax.numpy as jnp
import optax

from megatransformer_jax.config.optimizer import OptimizerConfig


def build_schedule(config: OptimizerConfig, total_steps: int) -> optax.Schedule:
    """The configured schedule, for a run of `total_steps` steps counted from 0.

    Returns:
      A function from the step (int or int32 []) to the learning rate, float32 [].

    Raises:
      ValueError: if the name is unknown or warmup and decay do not fit into the run.
    """
    if config.warmup_steps + config.decay_steps > total_steps:
        raise ValueError(
            f"warmup_steps={config.warmup_steps} + decay_steps={config.decay_steps} exceed the "
            f"{total_steps} steps of the run; shorten them."
        )
    match config.schedule:
        case "warmup_cosine":
            shape = _cosine(config.warmup_steps, total_steps, config.final_fraction)
        case "wsd":
            shape = _stable_then_decay(config.decay_steps, total_steps, config.final_fraction)
        case "constant":
            shape = jnp.ones_like
        case _:
            raise ValueError(
                f"unknown schedule {config.schedule!r}; known: warmup_cosine, wsd, constant"
            )

    def schedule(step: jax.typing.ArrayLike) -> jax.Array:
        step = jnp.asarray(step, jnp.float32)
        warmup = jnp.minimum(1.0, (step + 1.0) / max(config.warmup_steps, 1))
        return jnp.float32(config.learning_rate) * warmup * shape(step)

    return schedule


def _cosine(warmup_steps: int, total_steps: int, final_fraction: float) -> optax.Schedule:
    """Half a cosine from 1 at the end of warmup to `final_fraction` at the last step."""
    span = max(total_steps - 1 - warmup_steps, 1)

    def shape(step: jax.Array) -> jax.Array:
        progress = jnp.clip((step - warmup_steps) / span, 0.0, 1.0)
        return final_fraction + (1.0 - final_fraction) * 0.5 * (1.0 + jnp.cos(jnp.pi * progress))

    return shape


def _stable_then_decay(decay_steps: int, total_steps: int, final_fraction: float) -> optax.Schedule:
    """1 until the last `decay_steps` steps, then 1 - sqrt decay (arXiv 2405.18392)."""

    def shape(step: jax.Array) -> jax.Array:
        progress = jnp.clip((step + 1.0 - (total_steps - decay_steps)) / decay_steps, 0.0, 1.0)
        return 1.0 - (1.0 - final_fraction) * jnp.sqrt(progress)

    return shape
