"""Random changes of training images and clips."""

import numpy as np
from scipy import ndimage

from megatransformer_jax.config.media_data import AudioAugmentationConfig, ImageAugmentationConfig
from megatransformer_jax.extras import import_extra

# ------------------------------------------------------------------------------
# Images: geometry, then colour.


def augment_image(
    pixels: np.ndarray, options: ImageAugmentationConfig, rng: np.random.Generator
) -> np.ndarray:
    """The image changed as `options` says; the same for the same state of `rng`.

    Places that come into sight at the edge continue it. Each option has draws of its own, so that
    turning one on leaves what the others do.

    Args:
      pixels: float32 [height, width, C] in [-1, 1].
      options: how much.
      rng: of this row; makes the same number of draws whatever the options.

    Returns:
      float32 [height, width, C] in [-1, 1].
    """
    flip, zoom, rotation, crop, *shares = rng.random(4 + 2 + 2 + 3)
    matrix, offset = _geometry(
        pixels.shape[:2], options, 2 * zoom - 1, 2 * rotation - 1, crop, shares[:2], shares[2:4]
    )
    if flip < options.flip_rate:
        pixels = pixels[:, ::-1]
    if not (np.array_equal(matrix, np.eye(2)) and not offset.any()):
        channels = [
            ndimage.affine_transform(pixels[..., c], matrix, offset, order=1, mode="nearest")
            for c in range(pixels.shape[-1])
        ]
        pixels = np.stack(channels, axis=-1)
    brightness, contrast, saturation = 2 * np.array(shares[4:]) - 1
    if options.max_saturation and pixels.shape[-1] == 3:
        grey = pixels.mean(axis=-1, keepdims=True)
        pixels = grey + (pixels - grey) * (1 + options.max_saturation * saturation)
    if options.max_contrast:
        mean = pixels.mean()
        pixels = mean + (pixels - mean) * (1 + options.max_contrast * contrast)
    pixels = pixels + options.max_brightness * brightness
    return np.clip(pixels, -1, 1).astype(np.float32)


def _geometry(
    size: tuple[int, ...],
    options: ImageAugmentationConfig,
    zoom: float,
    rotation: float,
    crop: float,
    shift: list[float],
    corner: list[float],
) -> tuple[np.ndarray, np.ndarray]:
    """Matrix and offset from places of the new image to those of the old one, in pixels.

    Shares `crop`, `shift` and `corner` are in [0, 1], `zoom` and `rotation` in [-1, 1].
    """
    extent = np.array(size)
    middle = (extent - 1) / 2
    angle = np.deg2rad(options.max_rotation_deg * rotation)
    kept = 1 - (1 - options.min_crop) * crop
    scale = kept * (1 + options.max_zoom) ** zoom
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    matrix = scale * turn
    moved = (2 * np.array(shift) - 1) * options.max_shift * extent
    moved += (np.array(corner) - 0.5) * (1 - kept) * extent
    return matrix, middle + moved - matrix @ middle


# ------------------------------------------------------------------------------
# Clips: speed, loudness and noise of the waveform, masks on the spectrogram.


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
    soxr = import_extra("soxr", "media", "sound at another pace")
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
