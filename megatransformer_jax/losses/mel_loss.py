"""How far a waveform's log-mel spectrogram is from another's."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from megatransformer_jax.config.audio import MelConfig
from megatransformer_jax.ops.sound import log_mel


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
