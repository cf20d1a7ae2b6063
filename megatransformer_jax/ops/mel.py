"""Log-mel spectrograms on the device, equal to those of `data/mel.py` on the host."""

import functools

import jax.numpy as jnp
import librosa
import numpy as np
from jaxtyping import Array, Float, Int

from megatransformer_jax.config.audio import HIGHEST_LOG, LOWEST_LOG, LOWEST_MAGNITUDE, MelConfig
from megatransformer_jax.ops.stft import stft_magnitude


@functools.lru_cache(maxsize=16)
def mel_filters(config: MelConfig) -> np.ndarray:
    """Weights from frequencies to mel bins, float32 [fft_samples // 2 + 1, M]; librosa's."""
    filters = librosa.filters.mel(
        sr=config.sample_rate_hz,
        n_fft=config.fft_samples,
        n_mels=config.num_mels,
        fmin=config.min_hz,
        fmax=config.max_hz,
        dtype=np.float32,
    )
    return np.ascontiguousarray(filters.T)


def log_mel(waveform: Float[Array, "N samples"], config: MelConfig) -> Float[Array, "N F M"]:
    """ln(max(mel magnitude, 1e-5)) of `ceil(samples / hop_samples)` frames; see `ops.stft`."""
    magnitude = stft_magnitude(
        waveform, config.fft_samples, config.window_samples, config.hop_samples
    )
    mel = magnitude @ jnp.asarray(mel_filters(config))
    return jnp.log(jnp.maximum(mel, LOWEST_MAGNITUDE))


def normalize(log_mel: Float[Array, "*frames M"]) -> Float[Array, "*frames M"]:
    """What models see: the range from ln 1e-5 to 2 becomes -1 to 1, linearly; nothing is cut."""
    return (log_mel - LOWEST_LOG) * (2 / (HIGHEST_LOG - LOWEST_LOG)) - 1


def denormalize(normalized: Float[Array, "*frames M"]) -> Float[Array, "*frames M"]:
    """The log-mel spectrogram whose `normalize` is given."""
    return (normalized + 1) * ((HIGHEST_LOG - LOWEST_LOG) / 2) + LOWEST_LOG


def normalized_mel(
    waveform: Float[Array, "N samples"], lengths: Int[Array, "N"], config: MelConfig
) -> Float[Array, "N F M"]:
    """Mels as a batch holds them: normalised, and 0 from frame `lengths[n]` on.

    Args:
      waveform: clips, filled up to the same number of samples; what is beyond a clip is not used.
      lengths: frames of each clip.
      config: of the spectrogram.
    """
    samples = jnp.arange(waveform.shape[1]) < lengths[:, None] * config.hop_samples
    mel = normalize(log_mel(jnp.where(samples, waveform, 0.0), config))
    frames = jnp.arange(mel.shape[1]) < lengths[:, None]
    return jnp.where(frames[..., None], mel, 0.0)
