"""The loss of a diffusion, over any network that predicts noise or velocity."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Key

from megatransformer_jax.config.decoders import DiffusionConfig
from megatransformer_jax.models.decoders.decoder import Condition, decoder_keys
from megatransformer_jax.models.decoders.guidance import Denoiser, drop_conditions
from megatransformer_jax.ops.diffusion import (
    DiffusionSchedule,
    add_noise,
    min_snr_weight,
    prediction_target,
)


def schedule_of(config: DiffusionConfig) -> DiffusionSchedule:
    """The configured schedule."""
    return DiffusionSchedule(config.schedule, config.num_times)


def draw_noise(
    keys: Key[Array, "N"], shape: tuple[int, ...], is_valid: Bool[Array, "N ..."] | None
) -> Float[Array, "N ..."]:
    """Standard normal noise of this shape for each medium, zero where `is_valid` is False.

    JAX counts through an array's last axis first, so noise does not change where the first axis of
    `shape` gets longer by padding.
    """
    noise = jax.vmap(lambda key: jax.random.normal(key, shape))(keys)
    return noise if is_valid is None else jnp.where(is_valid, noise, 0.0)


def diffusion_loss(
    denoise: Denoiser,
    config: DiffusionConfig,
    media: Float[Array, "N ..."],
    condition: Condition,
    key: Key[Array, ""],
    *,
    condition_dropout_rate: float = 0.0,
    is_valid: Bool[Array, "N ..."] | None = None,
) -> dict[str, Float[Array, "N"]]:
    """Squared error of the prediction at one random time per medium, float32.

    Args:
      denoise: the network, called once.
      config: schedule, prediction and weights.
      media: clean media.
      condition: of each.
      key: of times, noise and dropped conditions; every medium has its own, see `decoder_keys`.
      condition_dropout_rate: see `drop_conditions`.
      is_valid: which values are there, of a shape that broadcasts to the media's. None: all. The
        others are zeros in what the network gets and do not count. A medium without any has loss 0.

    Returns:
      'loss', weighted by time, and 'squared_error', not weighted; means over values.
    """
    schedule = schedule_of(config)
    keys = jax.vmap(lambda key: jax.random.split(key, 3))(decoder_keys(key, len(media)))
    time = jax.vmap(schedule.draw_time)(keys[:, 0])
    clean = media.astype(jnp.float32)
    clean = clean if is_valid is None else jnp.where(is_valid, clean, 0.0)
    noise = draw_noise(keys[:, 1], media.shape[1:], is_valid)
    condition = drop_conditions(condition, keys[:, 2], condition_dropout_rate)
    alpha_bar = schedule.alpha_bar(time)
    predicted = denoise(add_noise(clean, noise, alpha_bar), time, condition)
    target = prediction_target(config.prediction, clean, noise, alpha_bar)
    error = mean_of_valid(jnp.square(predicted.astype(jnp.float32) - target), is_valid)
    if config.min_snr_gamma is None:
        return {"loss": error, "squared_error": error}
    weight = min_snr_weight(config.prediction, alpha_bar, config.min_snr_gamma)
    return {"loss": weight * error, "squared_error": error}


def mean_of_valid(
    values: Float[Array, "N ..."], is_valid: Bool[Array, "N ..."] | None
) -> Float[Array, "N"]:
    """Each medium's mean over its valid values; 0 if it has none."""
    axes = tuple(range(1, values.ndim))
    if is_valid is None:
        return jnp.mean(values, axis=axes)
    is_valid = jnp.broadcast_to(is_valid, values.shape)
    total = jnp.sum(jnp.where(is_valid, values, 0.0), axis=axes)
    return total / jnp.maximum(jnp.sum(is_valid, axis=axes), 1)
