"""Media by diffusion: the loss, the loop that draws, and the decoder of images made of both."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Key

from megatransformer_jax.config.decoders import DiffusionConfig, SamplerConfig
from megatransformer_jax.models.media.decoder import (
    Condition,
    Denoiser,
    ImageDecoder,
    apply_guidance,
    decoder_keys,
    drop_conditions,
)
from megatransformer_jax.ops.diffusion import (
    DiffusionSchedule,
    add_noise,
    ddim_step,
    ddpm_step,
    dynamic_threshold,
    min_snr_weight,
    predicted_clean,
    prediction_target,
)

# ------------------------------------------------------------------------------
# The loss, over any network that predicts noise or velocity.


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


# ------------------------------------------------------------------------------
# Drawing media by diffusion: one compiled loop over the steps of DDPM or DDIM.


def sample_diffusion(
    denoise: Denoiser,
    config: DiffusionConfig,
    settings: SamplerConfig,
    condition: Condition,
    shape: tuple[int, ...],
    key: Key[Array, ""],
    *,
    guidance_scale: Float[Array, ""] | float | None = None,
    is_valid: Bool[Array, "N ..."] | None = None,
) -> Float[Array, "N ..."]:
    """Draws one medium of this shape per condition, float32.

    Args:
      denoise: the network as a pure function: it is called in a loop, where a bound linen module
        must not be (`network, variables = self.network.unbind()`).
      config: as trained.
      settings: sampler, steps, guidance, threshold.
      condition: of each.
      shape: of one medium.
      key: every medium has its own of it, see `decoder_keys`.
      guidance_scale: in place of the settings'; may be traced, so that no value recompiles.
      is_valid: which values are there; see `diffusion_loss`. The others are zeros.

    Raises:
      ValueError: for more steps than the diffusion has times.
    """
    schedule = schedule_of(config)
    denoise = apply_guidance(denoise, settings.guidance_scale, guidance_scale)
    times = jnp.asarray(schedule.sampling_times(settings.num_steps))
    count = len(condition.is_context)
    keys = decoder_keys(key, count)

    def step(noisy: jax.Array, now: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
        index, *pair = now
        time, next_time = (jnp.full(count, at) for at in pair)
        a, next_a = schedule.alpha_bar(time), schedule.alpha_bar(next_time)
        predicted = denoise(noisy, time, condition).astype(jnp.float32)
        clean = predicted_clean(config.prediction, predicted, noisy, a)
        clean = limit(clean, settings, is_valid)
        step_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, index)
        noise = draw_noise(step_keys, shape, is_valid)
        if settings.sampler == "ddpm":
            noisy = ddpm_step(clean, noisy, noise, a, next_a)
        else:
            noisy = ddim_step(clean, noisy, noise, a, next_a, settings.eta)
        return (noisy if is_valid is None else jnp.where(is_valid, noisy, 0.0)), None

    # Step 0 is the first draw, the loop's are 1, 2, ...
    first_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, 0)
    first = draw_noise(first_keys, shape, is_valid)
    steps = (jnp.arange(1, settings.num_steps + 1), times[:-1], times[1:])
    return jax.lax.scan(step, first, steps)[0]


def limit(
    clean: Float[Array, "N ..."],
    settings: SamplerConfig,
    is_valid: Bool[Array, "N ..."] | None = None,
) -> Float[Array, "N ..."]:
    """Predicted media brought into range as `settings.threshold` says.

    Raises:
      ValueError: for an unknown threshold.
    """
    match settings.threshold:
        case "none":
            return clean
        case "clip":
            return jnp.clip(clean, -1.0, 1.0)
        case "dynamic":
            return dynamic_threshold(clean, settings.threshold_quantile, is_valid)
    raise ValueError(f"unknown threshold {settings.threshold!r}; known: none, clip, dynamic")


# ------------------------------------------------------------------------------
# A decoder of images that learns and samples a diffusion.


class DiffusionDecoder(ImageDecoder):
    """The network predicts noise or velocity. Terms of the loss: 'loss' and 'squared_error'.

    Attributes:
      diffusion: as it is trained.
      sampler: as it is sampled unless told otherwise.
    """

    diffusion: DiffusionConfig
    sampler: SamplerConfig

    def process_loss(
        self, denoise: Denoiser, media: jax.Array, condition: Condition, key: jax.Array
    ) -> dict[str, jax.Array]:
        """See `ImageDecoder`."""
        return diffusion_loss(
            denoise,
            self.diffusion,
            media,
            condition,
            key,
            condition_dropout_rate=self.condition_dropout_rate,
        )

    def process_sample(
        self,
        denoise: Denoiser,
        condition: Condition,
        key: jax.Array,
        settings: SamplerConfig | None,
        guidance_scale: Any,
    ) -> jax.Array:
        """See `ImageDecoder`; ValueError for more steps than the diffusion has times."""
        return sample_diffusion(
            denoise,
            self.diffusion,
            self.sampler if settings is None else settings,
            condition,
            self.shape,
            key,
            guidance_scale=guidance_scale,
        )
