"""Drawing media by diffusion: one compiled loop over the steps of DDPM or DDIM."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Key

from megatransformer_jax.config.decoders import DiffusionConfig, SamplerConfig
from megatransformer_jax.models.decoders.decoder import Condition, decoder_keys
from megatransformer_jax.models.decoders.diffusion import draw_noise, schedule_of
from megatransformer_jax.models.decoders.guidance import Denoiser, apply_guidance
from megatransformer_jax.ops.diffusion import (
    ddim_step,
    ddpm_step,
    dynamic_threshold,
    predicted_clean,
)


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
      guidance_scale: in place of the settings'; may be traced, so that no value compiles anew.
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
