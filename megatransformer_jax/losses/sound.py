"""Losses of waveforms: spectrograms at several resolutions, log-mel, adversarial.

The first section is what training a vocoder minimises, generator and discriminators at once.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from megatransformer_jax.config.audio import MelConfig
from megatransformer_jax.config.vocoder import VocoderConfig
from megatransformer_jax.models.vocoders import (
    DISCRIMINATOR,
    GENERATOR,
    build_discriminators,
    build_generator,
)
from megatransformer_jax.ops.sound import log_mel, normalized_mel, stft_magnitude
from megatransformer_jax.types import DTypePolicy, WaveformBatch

# ------------------------------------------------------------------------------
# What training a vocoder minimises.


def resynthesize(
    config: VocoderConfig, policy: DTypePolicy, params: Any, batch: WaveformBatch
) -> Float[Array, "N samples"]:
    """The waveforms that the vocoder makes of the mel spectrograms of a batch."""
    mels = normalized_mel(batch.waveforms, batch.lengths, config.mel)
    waveforms: Any = build_generator(config, policy).apply(
        {"params": params[GENERATOR]}, mels, batch.lengths
    )
    return waveforms


def spectral_losses(
    config: VocoderConfig, generated: Float[Array, "N samples"], batch: WaveformBatch
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """The weighted sum of both spectral losses, and stft_loss and mel_loss.

    Means over the rows that are not padding.
    """
    samples = batch.lengths * config.mel.hop_samples
    counts = (batch.lengths > 0).astype(jnp.float32)
    total = jnp.maximum(jnp.sum(counts), 1.0)
    stft = multi_resolution_stft_loss(generated, batch.waveforms, samples, config.loss.fft_samples)
    mel = mel_loss(generated, batch.waveforms, batch.lengths, config.mel)
    means = {
        "stft_loss": jnp.sum(stft * counts) / total,
        "mel_loss": jnp.sum(mel * counts) / total,
    }
    weights = config.loss
    loss = weights.stft_weight * means["stft_loss"] + weights.mel_weight * means["mel_loss"]
    return loss, means


def vocoder_loss(
    config: VocoderConfig, policy: DTypePolicy, params: Any, batch: WaveformBatch
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """The sum of the generator's and the discriminators' losses, and its parts.

    One gradient of the sum serves both: the generator's terms see discriminators that are held,
    the discriminators' terms see sound that is held, so that each is moved by its own loss alone.

    Args:
      config: of the vocoder.
      policy: types.
      params: as `init_vocoder` makes them.
      batch: pieces of clips.

    Returns:
      The sum; stft_loss, mel_loss, and with discriminators adversarial_loss, feature_loss (of the
      generator) and discriminator_loss.
    """
    generated = resynthesize(config, policy, params, batch)
    loss, terms = spectral_losses(config, generated, batch)
    discriminators = build_discriminators(config, policy)
    if discriminators is None:
        return loss, terms

    def features(params: Any, waveforms: jax.Array) -> Any:
        return discriminators.apply({"params": params}, waveforms)

    held = jax.lax.stop_gradient(params[DISCRIMINATOR])
    made = features(held, generated)
    recorded = features(params[DISCRIMINATOR], batch.waveforms)
    judged = features(params[DISCRIMINATOR], jax.lax.stop_gradient(generated))
    terms |= {
        "adversarial_loss": generator_loss(made),
        "feature_loss": feature_matching_loss(jax.lax.stop_gradient(recorded), made),
        "discriminator_loss": discriminator_loss(recorded, judged),
    }
    options = config.discriminator
    loss = loss + options.weight * terms["adversarial_loss"]
    loss = loss + options.feature_weight * terms["feature_loss"] + terms["discriminator_loss"]
    return loss, terms


# ------------------------------------------------------------------------------
# How far a waveform's log-mel spectrogram is from another's.


def mel_loss(
    predicted: Float[Array, "N samples"],
    target: Float[Array, "N samples"],
    lengths: Int[Array, "N"],
    config: MelConfig,
) -> Float[Array, "N"]:
    """Mean absolute difference of the natural logarithms of each clip.

    Args:
      predicted: 0 beyond each clip.
      target: the same.
      lengths: frames of each clip; others do not count.
      config: of the spectrogram.

    Returns:
      The loss of each clip; 0 for an empty one.
    """
    difference = jnp.abs(log_mel(predicted, config) - log_mel(target, config))
    counts = (jnp.arange(difference.shape[1]) < lengths[:, None])[..., None]
    total = jnp.sum(difference * counts, axis=(1, 2))
    return total / jnp.maximum(lengths * config.num_mels, 1)


# ------------------------------------------------------------------------------
# How far a waveform's spectrogram is from another's, at several resolutions.

# Below, magnitudes are silence: their logarithm is that of the floor.
MAGNITUDE_FLOOR = 1e-5
# Frames of a clip's transform per window.
OVERLAP = 4


def stft_loss(
    predicted: Float[Array, "N samples"],
    target: Float[Array, "N samples"],
    num_samples: Int[Array, "N"],
    fft_samples: int,
) -> Float[Array, "N"]:
    """Spectral convergence plus mean log-magnitude distance of each clip, at one resolution.

    With magnitudes S of the target and P: |S - P| / |S| (Frobenius norms) + mean |ln S - ln P|
    (arXiv 1910.11480). The Hann window has `fft_samples`, a quarter of which is the hop. Frames
    that begin beyond a clip do not count.

    Args:
      predicted: 0 beyond each clip.
      target: the same.
      num_samples: of each clip.
      fft_samples: length of the transform.

    Returns:
      The loss of each clip; 0 for an empty one.
    """
    hop = fft_samples // OVERLAP
    ours, theirs = (
        stft_magnitude(x, fft_samples, fft_samples, hop, floor=MAGNITUDE_FLOOR)
        for x in (predicted, target)
    )
    num_frames = -(-num_samples // hop)
    counts = (jnp.arange(ours.shape[1]) < num_frames[:, None])[..., None]
    difference = jnp.sum(jnp.square(theirs - ours) * counts, axis=(1, 2))
    energy = jnp.sum(jnp.square(theirs) * counts, axis=(1, 2))
    is_different = difference > 0  # The square root's slope is infinite at 0.
    distance = jnp.where(is_different, jnp.sqrt(jnp.where(is_different, difference, 1.0)), 0.0)
    convergence = distance / jnp.sqrt(jnp.maximum(energy, MAGNITUDE_FLOOR**2))
    logs = jnp.sum(jnp.abs(jnp.log(theirs) - jnp.log(ours)) * counts, axis=(1, 2))
    return convergence + logs / jnp.maximum(num_frames * ours.shape[-1], 1)


def multi_resolution_stft_loss(
    predicted: Float[Array, "N samples"],
    target: Float[Array, "N samples"],
    num_samples: Int[Array, "N"],
    fft_samples: Sequence[int],
) -> Float[Array, "N"]:
    """The mean of `stft_loss` over lengths of the transform; args and shapes are its."""
    losses = [stft_loss(predicted, target, num_samples, size) for size in fft_samples]
    return sum(losses[1:], losses[0]) / len(losses)


# ------------------------------------------------------------------------------
# Least-squares adversarial losses (arXiv 1611.04076) and feature matching (arXiv 1910.06711).
#
# A discriminator's features are the outputs of its layers in order, the last of them its score,
# which is to be 1 for recorded and 0 for generated sound. Losses are means over a discriminator's
# outputs, then over discriminators.

Features = Sequence[Sequence[Array]]


def discriminator_loss(recorded: Features, generated: Features) -> Float[Array, ""]:
    """mean (1 - D(recorded))^2 + mean D(generated)^2."""
    losses = [
        jnp.mean(jnp.square(1 - _score(real))) + jnp.mean(jnp.square(_score(made)))
        for real, made in zip(recorded, generated, strict=True)
    ]
    return _mean(losses)


def generator_loss(generated: Features) -> Float[Array, ""]:
    """mean (1 - D(generated))^2."""
    return _mean([jnp.mean(jnp.square(1 - _score(made))) for made in generated])


def feature_matching_loss(recorded: Features, generated: Features) -> Float[Array, ""]:
    """Mean absolute difference of the features before the score."""
    losses = [
        jnp.mean(jnp.abs(real.astype(jnp.float32) - made.astype(jnp.float32)))
        for reals, mades in zip(recorded, generated, strict=True)
        for real, made in zip(reals[:-1], mades[:-1], strict=True)
    ]
    return _mean(losses)


def _score(features: Sequence[Array]) -> Array:
    return features[-1].astype(jnp.float32)


def _mean(losses: Sequence[Array]) -> Float[Array, ""]:
    return jnp.mean(jnp.stack(losses))
