"""Media by flow matching: loss, sampler, and the decoder of images made of both."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from megatransformer_jax.config.decoders import FlowConfig, FlowSamplerConfig
from megatransformer_jax.models.media.decoder import (
    Condition,
    Denoiser,
    ImageDecoder,
    apply_guidance,
    decoder_keys,
    drop_conditions,
)
from megatransformer_jax.models.media.diffusion import draw_noise, mean_of_valid
from megatransformer_jax.ops.diffusion import (
    draw_flow_time,
    euler_step,
    flow_noisy,
    flow_times,
    flow_velocity,
    heun_step,
)

# ------------------------------------------------------------------------------
# Loss and sampler, over any network that predicts the velocity.


def flow_loss(
    denoise: Denoiser,
    config: FlowConfig,
    media: Float[Array, "N ..."],
    condition: Condition,
    key: Key[Array, ""],
    *,
    condition_dropout_rate: float = 0.0,
) -> dict[str, Float[Array, "N"]]:
    """Squared error of the velocity at one random time per medium, float32.

    Args:
      denoise: the network, called once.
      config: which times.
      media: clean media.
      condition: of each.
      key: of times, noise and dropped conditions; every medium has its own, see `decoder_keys`.
      condition_dropout_rate: see `drop_conditions`.

    Returns:
      'loss', the mean over values.
    """
    keys = jax.vmap(lambda key: jax.random.split(key, 3))(decoder_keys(key, len(media)))
    time = jax.vmap(
        lambda key: draw_flow_time(config.time_draw, config.time_mean, config.time_std, key)
    )(keys[:, 0])
    clean = media.astype(jnp.float32)
    noise = draw_noise(keys[:, 1], media.shape[1:], None)
    condition = drop_conditions(condition, keys[:, 2], condition_dropout_rate)
    predicted = denoise(flow_noisy(clean, noise, time), time, condition).astype(jnp.float32)
    return {"loss": mean_of_valid(jnp.square(predicted - flow_velocity(clean, noise)), None)}


def sample_flow(
    denoise: Denoiser,
    settings: FlowSamplerConfig,
    condition: Condition,
    shape: tuple[int, ...],
    key: Key[Array, ""],
    *,
    guidance_scale: Float[Array, ""] | float | None = None,
) -> Float[Array, "N ..."]:
    """Draws one medium of this shape per condition, float32; arguments as `sample_diffusion`."""
    denoise = apply_guidance(denoise, settings.guidance_scale, guidance_scale)
    times = flow_times(settings.num_steps)
    count = len(condition.is_context)

    def velocity_at(noisy: jax.Array, time: jax.Array) -> jax.Array:
        return denoise(noisy, jnp.full(count, time), condition).astype(jnp.float32)

    def step(noisy: jax.Array, pair: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        time, next_time = pair
        velocity = velocity_at(noisy, time)
        arrived = euler_step(noisy, velocity, time, next_time)
        if settings.sampler == "euler":
            return arrived, None
        next_velocity = velocity_at(arrived, next_time)
        return heun_step(noisy, velocity, next_velocity, time, next_time), None

    first = draw_noise(decoder_keys(key, count), shape, None)
    return jax.lax.scan(step, first, (times[:-1], times[1:]))[0]


# ------------------------------------------------------------------------------
# A decoder of images that learns and samples a flow.


class FlowDecoder(ImageDecoder):
    """The network predicts the velocity. The loss has one term, 'loss'.

    Attributes:
      flow: as it is trained.
      sampler: as it is sampled unless told otherwise.
    """

    flow: FlowConfig
    sampler: FlowSamplerConfig

    def process_loss(
        self, denoise: Denoiser, media: jax.Array, condition: Condition, key: jax.Array
    ) -> dict[str, jax.Array]:
        """See `ImageDecoder`."""
        return flow_loss(
            denoise,
            self.flow,
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
        settings: FlowSamplerConfig | None,
        guidance_scale: Any,
    ) -> jax.Array:
        """See `ImageDecoder`."""
        return sample_flow(
            denoise,
            self.sampler if settings is None else settings,
            condition,
            self.shape,
            key,
            guidance_scale=guidance_scale,
        )
