"""Spectrograms on the device, differentiable: short-time Fourier transform and inverse, log-mel.

Conventions. Frame i is centred on sample `i * hop_samples`; what lies before the first and after
the last sample is 0 (librosa's `center=True, pad_mode="constant"`). A waveform is filled up with
zeros to a multiple of the hop, and there are exactly `samples / hop_samples` frames: librosa's
last one, centred on the end, is dropped. So zeros after a clip never change the clip's frames.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Complex, Float, Int

from megatransformer_jax.config.audio import HIGHEST_LOG, LOWEST_LOG, LOWEST_MAGNITUDE, MelConfig
from megatransformer_jax.extras import import_extra

# Below this a window holds no more than rounding errors to divide by.
_LEAST_WINDOW_POWER = 1e-8


def num_frames(num_samples: int, hop_samples: int) -> int:
    """Frames of a waveform: its hops, a started one included."""
    return -(-num_samples // hop_samples)


def hann_window(window_samples: int, fft_samples: int) -> np.ndarray:
    """Periodic Hann window, zeros on both sides up to `fft_samples`; float32.

    Raises:
      ValueError: if the window is longer than the transform.
    """
    if window_samples > fft_samples:
        raise ValueError(
            f"window_samples={window_samples} exceeds fft_samples={fft_samples}; lower it."
        )
    phase = 2 * np.pi * np.arange(window_samples) / window_samples
    before = (fft_samples - window_samples) // 2
    after = fft_samples - window_samples - before
    return np.pad(0.5 - 0.5 * np.cos(phase), (before, after)).astype(np.float32)


def stft(
    waveform: Float[Array, "N samples"], fft_samples: int, window_samples: int, hop_samples: int
) -> Complex[Array, "N F bins"]:
    """The transform of every frame, `fft_samples // 2 + 1` frequencies each.

    Args:
      waveform: any number of samples.
      fft_samples: length of the transform.
      window_samples: length of the Hann window.
      hop_samples: samples between frames.
    """
    window = jnp.asarray(hann_window(window_samples, fft_samples))
    return jnp.fft.rfft(_frames(waveform, fft_samples, hop_samples) * window, axis=-1)


def stft_magnitude(
    waveform: Float[Array, "N samples"],
    fft_samples: int,
    window_samples: int,
    hop_samples: int,
    floor: float = 0.0,
) -> Float[Array, "N F bins"]:
    """|stft|, at least `floor`; its gradient is 0 where the magnitude is 0 or below the floor.

    Args are those of `stft`.
    """
    spectrum = stft(waveform, fft_samples, window_samples, hop_samples)
    power = jnp.square(spectrum.real) + jnp.square(spectrum.imag)
    # The square root's slope is infinite at 0; a second `where` keeps it out of the gradient.
    is_above = power > floor**2
    return jnp.where(is_above, jnp.sqrt(jnp.where(is_above, power, 1.0)), floor)


def inverse_stft(
    spectrum: Complex[Array, "N F bins"],
    window_samples: int,
    hop_samples: int,
    lengths: Int[Array, "N"] | None = None,
) -> Float[Array, "N samples"]:
    """The waveform of exactly `F * hop_samples` samples whose transform is nearest to `spectrum`.

    Windowed overlap-add, divided by the sum of the squared windows (Griffin and Lim, 1984).
    Inverts `stft` but for the last half window, of which the frames beyond the end are missing,
    and only if windows overlap (`hop_samples < window_samples`). The transform's length must be
    even.

    Args:
      spectrum: of every frame.
      window_samples: length of the Hann window.
      hop_samples: samples between frames.
      lengths: frames of each clip; what is beyond is not read, and its samples are 0. None: all.
    """
    num_media, frames, bins = spectrum.shape
    fft_samples = 2 * (bins - 1)
    window = hann_window(window_samples, fft_samples)
    pieces = jnp.fft.irfft(spectrum, fft_samples, axis=-1) * window
    squared = jnp.asarray(np.broadcast_to(np.square(window), (1, frames, fft_samples)))
    if lengths is not None:
        is_frame = (jnp.arange(frames) < lengths[:, None])[..., None]
        pieces, squared = (jnp.where(is_frame, x, 0.0) for x in (pieces, squared))
    summed, power = (_overlap_add(x, hop_samples) for x in (pieces, squared))
    start, length = fft_samples // 2, frames * hop_samples
    missing = max(0, start + length - summed.shape[1])
    summed, power = (jnp.pad(x, ((0, 0), (0, missing))) for x in (summed, power))
    waveform = jnp.where(
        power > _LEAST_WINDOW_POWER, summed / jnp.maximum(power, _LEAST_WINDOW_POWER), 0.0
    )
    waveform = waveform[:, start : start + length].reshape(num_media, length)
    if lengths is None:
        return waveform
    return jnp.where(jnp.arange(length) < lengths[:, None] * hop_samples, waveform, 0.0)


def _frames(waveform: jax.Array, fft_samples: int, hop_samples: int) -> jax.Array:
    """[N, F, fft_samples], from slices: their gradient needs no scatter, as a gather's would."""
    num_media, samples = waveform.shape
    frames, blocks = num_frames(samples, hop_samples), num_frames(fft_samples, hop_samples)
    length = (frames + blocks - 1) * hop_samples
    before = fft_samples // 2
    padded = jnp.pad(waveform, ((0, 0), (before, max(0, length - before - samples))))
    hops = padded[:, :length].reshape(num_media, -1, hop_samples)
    shifted = [hops[:, block : block + frames] for block in range(blocks)]
    return jnp.concatenate(shifted, axis=-1)[..., :fft_samples]


def _overlap_add(pieces: jax.Array, hop_samples: int) -> jax.Array:
    """Sums [N, F, length] so that piece i begins at sample `i * hop_samples`."""
    num_media, frames, length = pieces.shape
    blocks = num_frames(length, hop_samples)
    pieces = jnp.pad(pieces, ((0, 0), (0, 0), (0, blocks * hop_samples - length)))
    pieces = pieces.reshape(num_media, frames, blocks, hop_samples)
    hops = sum(
        jnp.pad(pieces[:, :, block], ((0, 0), (block, blocks - 1 - block), (0, 0)))
        for block in range(blocks)
    )
    return jnp.asarray(hops).reshape(num_media, -1)


# ------------------------------------------------------------------------------
# Log-mel spectrograms on the device, equal to those of `data/mel.py` on the host.


@functools.lru_cache(maxsize=16)
def mel_filters(config: MelConfig) -> np.ndarray:
    """Weights from frequencies to mel bins, float32 [fft_samples // 2 + 1, M]; librosa's."""
    librosa = import_extra("librosa", "media", "mel spectrograms")
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
