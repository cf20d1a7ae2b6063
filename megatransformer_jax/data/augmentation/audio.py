"""Random changes of a clip: speed, loudness and noise of its waveform, masks on its spectrogram."""

import numpy as np
import soxr

from megatransformer_jax.config.media_data import AudioAugmentationConfig


def augment_waveform(
    waveform: np.ndarray,
    sample_rate_hz: int,
    max_samples: int,
    options: AudioAugmentationConfig,
    rng: np.random.Generator,
) -> np.ndarray:
    """The clip changed as `options` says; the same for the same state of `rng`.

    Args:
      waveform: mono float32 [samples] in [-1, 1].
      sample_rate_hz: samples per second.
      max_samples: length that speed must not exceed.
      options: how much.
      rng: of this row.

    Returns:
      float32 [samples'] in [-1, 1].
    """
    speed, gain, noise, loudness = rng.random(4)
    if options.max_speed:
        factor = (1 + options.max_speed) ** (2 * speed - 1)
        waveform = _faster(waveform, sample_rate_hz, factor, max_samples)
    if options.max_gain_db:
        waveform = waveform * 10 ** (options.max_gain_db * (2 * gain - 1) / 20)
    if noise < options.noise_rate:
        snr_db = options.min_snr_db + (options.max_snr_db - options.min_snr_db) * loudness
        power = np.mean(np.square(waveform, dtype=np.float64)) * 10 ** (-snr_db / 10)
        waveform = waveform + np.sqrt(power) * rng.standard_normal(len(waveform))
    return np.clip(waveform, -1, 1).astype(np.float32)


def _faster(
    waveform: np.ndarray, sample_rate_hz: int, factor: float, max_samples: int
) -> np.ndarray:
    """Played `factor` times as fast, or as slowly as fits in `max_samples`."""
    # Some resamplers round the length up.
    slowest = len(waveform) / max(max_samples - 2, 1)
    if factor < 1:
        factor = min(max(factor, slowest), 1.0)
    # Taken as sound of a higher rate, it has fewer samples at the true one.
    changed = soxr.resample(waveform, sample_rate_hz * factor, sample_rate_hz)
    return changed if len(changed) else waveform


def augment_mel(
    mel: np.ndarray, options: AudioAugmentationConfig, rng: np.random.Generator
) -> np.ndarray:
    """SpecAugment (arXiv 1904.08779): stretches of frames and bands of bins become the clip's mean.

    Args:
      mel: float32 [F, M], the frames of the clip alone.
      options: how many masks, and how wide.
      rng: of this row.
    """
    if not (options.time_masks or options.frequency_masks):
        return mel
    masked, mean = mel.copy(), mel.mean()
    frames, bins = mel.shape
    for _ in range(options.time_masks):
        width = int(rng.integers(int(options.max_time_mask * frames) + 1))
        start = int(rng.integers(frames - width + 1))
        masked[start : start + width] = mean
    for _ in range(options.frequency_masks):
        width = int(rng.integers(min(options.max_frequency_mask, bins) + 1))
        start = int(rng.integers(bins - width + 1))
        masked[:, start : start + width] = mean
    return masked
