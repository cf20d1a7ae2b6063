"""A decoder of sound that learns and samples a diffusion of mel spectrograms."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float, Int, Key

from megatransformer_jax.config.audio import AudioConfig
from megatransformer_jax.config.decoders import SamplerConfig
from megatransformer_jax.models.decoders.decoder import Condition
from megatransformer_jax.models.decoders.diffusion import diffusion_loss
from megatransformer_jax.models.decoders.duration import (
    DurationHead,
    duration_error,
    whole_frames,
)
from megatransformer_jax.models.decoders.guidance import Denoiser
from megatransformer_jax.models.decoders.samplers import sample_diffusion
from megatransformer_jax.nn.conv import frame_mask
from megatransformer_jax.nn.mel_denoiser import MelDenoiser
from megatransformer_jax.types import DTypePolicy


class MelDiffusionDecoder(nn.Module):
    """Normalised mels [F, M] of any length up to `max_frames`, as a `MediaDecoder`."""

    config: AudioConfig
    policy: DTypePolicy

    def setup(self) -> None:
        """Declares the network, and the head that tells the length."""
        self.network = MelDenoiser(self.config.decoder, self.policy)
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
