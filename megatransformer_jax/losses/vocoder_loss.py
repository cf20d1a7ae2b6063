"""What training a vocoder minimises, generator and discriminators at once."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from megatransformer_jax.config.vocoder import VocoderConfig
from megatransformer_jax.losses.adversarial import (
    discriminator_loss,
    feature_matching_loss,
    generator_loss,
)
from megatransformer_jax.losses.mel_loss import mel_loss
from megatransformer_jax.losses.stft_loss import multi_resolution_stft_loss
from megatransformer_jax.models.vocoders.build import (
    DISCRIMINATOR,
    GENERATOR,
    build_discriminators,
    build_generator,
)
from megatransformer_jax.ops.sound import normalized_mel
from megatransformer_jax.types import DTypePolicy, WaveformBatch


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
