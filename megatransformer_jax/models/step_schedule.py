"""How many iterations the core makes in a training step."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from megatransformer_jax.config.model import RecurrenceConfig

# Sequential Poisson and geometric draws are integers of this type.
STEP_DTYPE = jnp.int32


def mean_at_step(config: RecurrenceConfig, step: Int[Array, ""] | int) -> Float[Array, ""]:
    """The mean number of iterations at an optimiser step: the curriculum's ramp.

    Grows from `ramp_from` to `mean_steps` over `ramp_steps`: in proportion to t ('linear') or to
    1 - sqrt(1 - t) ('one_minus_sqrt'), slow at first and fast at the end, t in [0, 1].
    """
    if config.ramp == "none":
        return jnp.float32(config.mean_steps)
    progress = jnp.clip(jnp.asarray(step, jnp.float32) / config.ramp_steps, 0.0, 1.0)
    if config.ramp == "one_minus_sqrt":
        progress = 1.0 - jnp.sqrt(1.0 - progress)
    return config.ramp_from + progress * (config.mean_steps - config.ramp_from)


def draw_num_steps(
    config: RecurrenceConfig,
    key: Key[Array, ""],
    step: Int[Array, ""] | int,
    batch_size: int,
    length: int,
) -> Int[Array, "*draws"]:
    """Draws the number of iterations, 1 to `max_steps`, for a training step.

    Args:
      config: distribution, ramp and what gets a draw of its own.
      key: the run's key; the draw depends on (key, step) alone, so it is the same on every host
        and after a resume.
      step: optimiser step.
      batch_size: B.
      length: T.

    Returns:
      int32 [], [B] or [B, T], as `draw_per` says.
    """
    shapes = {"batch": (), "sequence": (batch_size,), "token": (batch_size, length)}
    mean = mean_at_step(config, step)
    draws = _sample(config, jax.random.fold_in(key, step), mean, shapes[config.draw_per])
    return jnp.clip(draws, 1, config.max_steps).astype(STEP_DTYPE)


def _sample(
    config: RecurrenceConfig, key: jax.Array, mean: jax.Array, shape: tuple[int, ...]
) -> jax.Array:
    match config.sampling:
        case "lognormal_poisson":
            return _lognormal_poisson(key, mean, config.sampling_sigma, shape)
        case "fixed":
            return jnp.broadcast_to(jnp.round(mean), shape)
        case "uniform":
            # 1 .. 2 * mean - 1, every value equally likely.
            highest = jnp.round(2 * mean).astype(STEP_DTYPE)
            return jax.random.randint(key, shape, 1, jnp.maximum(highest, 2), STEP_DTYPE)
        case "poisson":
            return jax.random.poisson(key, mean - 1.0, shape) + 1
        case "truncated_poisson":
            return _truncated_poisson(key, mean, config.max_steps, shape)
        case "geometric":
            return jax.random.geometric(key, 1.0 / mean, shape)
    raise ValueError(f"unknown sampling {config.sampling!r}; see RecurrenceConfig.sampling")


def _lognormal_poisson(
    key: jax.Array, mean: jax.Array, sigma: float, shape: tuple[int, ...]
) -> jax.Array:
    """Poisson(exp(normal)) + 1 (arXiv 2502.05171).

    The log-normal rate has mean `mean`, as upstream; so the draw's mean is mean + 1 less what the
    upstream `filling` variant's clamp takes off.
    """
    rate_key, count_key = jax.random.split(key)
    # A log-normal variable with this location has mean `mean`.
    location = jnp.log(mean) - sigma**2 / 2
    rate = jnp.exp(location + sigma * jax.random.normal(rate_key, shape))
    return jax.random.poisson(count_key, rate, shape) + 1


def _truncated_poisson(
    key: jax.Array, mean: jax.Array, max_steps: int, shape: tuple[int, ...]
) -> jax.Array:
    """Poisson(mean) given that it lies in 1 .. max_steps, by its exact probabilities."""
    values = jnp.arange(1, max_steps + 1)
    log_probability = values * jnp.log(mean) - jax.lax.lgamma(values + 1.0)
    return jax.random.categorical(key, log_probability, shape=shape) + 1
