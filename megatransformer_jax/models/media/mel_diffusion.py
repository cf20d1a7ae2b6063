"""A decoder of sound that diffuses mel spectrograms, of a length that it predicts first."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float, Int, Key

from megatransformer_jax.config.audio import AudioConfig
from megatransformer_jax.config.decoders import SamplerConfig
from megatransformer_jax.models.media.decoder import Condition, Denoiser
from megatransformer_jax.models.media.diffusion import diffusion_loss, sample_diffusion
from megatransformer_jax.nn.conv import ZEROS, Dense, frame_mask
from megatransformer_jax.nn.mel_denoiser import MelDenoiser
from megatransformer_jax.nn.norms import rms_normalize
from megatransformer_jax.nn.parameters import vector
from megatransformer_jax.types import DTypePolicy

# ------------------------------------------------------------------------------
# The decoder.


class MelDiffusionDecoder(nn.Module):
    """Normalised mels [F, M] of any length up to `max_frames`, as a `MediaDecoder`."""

    config: AudioConfig
    policy: DTypePolicy
    remat: str = "none"

    def setup(self) -> None:
        """Declares the network, and the head that tells the length."""
        self.network = MelDenoiser(self.config.decoder, self.policy, self.remat)
        self.duration = DurationHead(self.config.max_frames, self.policy)

    def loss(
        self,
        media: Float[Array, "N F M"],
        lengths: Int[Array, "N"] | None,
        condition: Condition,
        key: Key[Array, ""],
    ) -> dict[str, Float[Array, "N"]]:
        """See `MediaDecoder.loss`.

        Returns:
          'squared_error' of the diffusion at one time per clip, 'duration' (squared error of log
          frames), and 'loss', both weighted and added.

        Raises:
          ValueError: for spectrograms of other bins or too many frames, or without lengths.
        """
        config = self.config.decoder
        if lengths is None:
            raise ValueError("lengths are None, but clips need them; pass the frames of each.")
        self._check(media)

        def denoise(noisy: jax.Array, time: jax.Array, condition: Condition) -> Any:
            return self.network(noisy, lengths, time, condition.context, condition.is_context)

        terms = diffusion_loss(
            denoise,
            config.diffusion,
            media,
            condition,
            key,
            condition_dropout_rate=config.condition_dropout_rate,
            is_valid=frame_mask(lengths, media.shape[1])[..., None],
        )
        duration = duration_error(self.duration(condition), lengths)
        loss = terms["loss"] + config.duration_weight * duration
        return terms | {"duration": duration, "loss": loss}

    def sample(
        self,
        condition: Condition,
        key: Key[Array, ""],
        lengths: Int[Array, "N"] | None = None,
        settings: SamplerConfig | None = None,
        guidance_scale: Float[Array, ""] | float | None = None,
    ) -> tuple[Float[Array, "N F M"], Int[Array, "N"]]:
        """See `MediaDecoder.sample`; F is `max_frames`.

        Args:
          condition: of each.
          key: of the draw.
          lengths: frames to make, at most `max_frames`; None: those that the condition suggests.
          settings: of the sampler; None: the config's.
          guidance_scale: replaces that of the settings and may be traced.

        Raises:
          ValueError: for lengths out of range, if they are known when this is traced; or more steps
            than the diffusion has times.
        """
        config = self.config
        if lengths is None:
            lengths = whole_frames(self.duration(condition), config.max_frames)
        else:
            _check_lengths(lengths, config.max_frames)
        mels = sample_diffusion(
            self._denoiser(lengths),
            config.decoder.diffusion,
            config.decoder.sampler if settings is None else settings,
            condition,
            (config.max_frames, config.mel.num_mels),
            key,
            guidance_scale=guidance_scale,
            is_valid=frame_mask(lengths, config.max_frames)[..., None],
        )
        return mels, lengths

    def _denoiser(self, lengths: jax.Array) -> Denoiser:
        """The network as a pure function: loops of JAX must not call a bound module."""
        network, variables = self.network.unbind()

        def denoise(noisy: jax.Array, time: jax.Array, condition: Condition) -> Any:
            # Guidance asks for all clips twice over.
            repeated = jnp.tile(lengths, len(noisy) // len(lengths))
            return network.apply(
                variables, noisy, repeated, time, condition.context, condition.is_context
            )

        return denoise

    def _check(self, mels: jax.Array) -> None:
        frames, bins = mels.shape[1:]
        config = self.config
        if frames > config.max_frames or bins != config.mel.num_mels:
            raise ValueError(
                f"spectrograms have {frames} frames of {bins} bins, but the decoder makes up to "
                f"{config.max_frames} frames (max_frames) of {config.mel.num_mels} (mel.num_mels); "
                "change either."
            )


def _check_lengths(lengths: jax.Array, max_frames: int) -> None:
    if isinstance(lengths, jax.core.Tracer):
        return
    wrong = [int(length) for length in np.asarray(lengths) if not 0 <= length <= max_frames]
    if wrong:
        raise ValueError(f"lengths of {wrong} frames; each must be from 0 to {max_frames}.")


# ------------------------------------------------------------------------------
# How long a clip should be, from what the core says before it.

EPS = 1e-6


class DurationHead(nn.Module):
    """The logarithm of a clip's frames, by one hidden layer over the mean of the condition's
    vectors and the last of them. Starts at half of `max_frames`; without any vector it is a learned
    number."""

    max_frames: int
    policy: DTypePolicy

    @nn.compact
    def __call__(self, condition: Condition) -> Float[Array, "N"]:
        """Log frames, float32."""
        context, is_context = condition.context, condition.is_context
        width = context.shape[-1]
        scale = vector(self, "scale", nn.initializers.ones, (width,))
        x = jnp.where(is_context[..., None], context.astype(jnp.float32), 0.0)
        x = rms_normalize(x, scale, EPS)
        count = jnp.sum(is_context, axis=1, keepdims=True)
        mean = jnp.sum(x, axis=1) / jnp.maximum(count, 1)
        places = jnp.arange(1, x.shape[1] + 1)
        last = jnp.argmax(jnp.where(is_context, places, 0), axis=1)
        at_last = jnp.take_along_axis(x, last[:, None, None], axis=1)[:, 0]
        pooled = jnp.concatenate((mean, at_last), axis=-1)
        h = jax.nn.silu(Dense(width, self.policy, name="hidden")(pooled))
        log_frames = Dense(1, self.policy, kernel_init=ZEROS, bias=False, name="out")(h)[:, 0]
        start = nn.initializers.constant(math.log(max(self.max_frames / 2, 1)))
        return log_frames.astype(jnp.float32) + vector(self, "bias", start, ())


def duration_error(log_frames: Float[Array, "N"], lengths: Int[Array, "N"]) -> Float[Array, "N"]:
    """(log_frames - ln lengths)^2; 0 for clips of no frames."""
    error = jnp.square(log_frames - jnp.log(jnp.maximum(lengths, 1)))
    return jnp.where(lengths > 0, error, 0.0)


def whole_frames(log_frames: Float[Array, "N"], max_frames: int) -> Int[Array, "N"]:
    """The nearest number of frames, from 1 to `max_frames`."""
    frames = jnp.exp(jnp.clip(log_frames, 0.0, math.log(max_frames)))
    return jnp.clip(jnp.round(frames), 1, max_frames).astype(jnp.int32)
