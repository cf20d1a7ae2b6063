"""Log-mel spectrograms on the host, by librosa, and waveforms from them by Griffin-Lim.

`ops/sound.py` makes the same spectrograms on the device.
"""

from typing import Any

import numpy as np
from jaxtyping import Float

from megatransformer_jax.config.audio import HIGHEST_LOG, LOWEST_LOG, LOWEST_MAGNITUDE, MelConfig
from megatransformer_jax.extras import import_extra


def num_frames(num_samples: int, config: MelConfig) -> int:
    """Frames of a clip: its hops, a started one included."""
    return -(-num_samples // config.hop_samples)


def fill_hops(waveform: np.ndarray, config: MelConfig) -> np.ndarray:
    """The clip with zeros at its end, `num_frames * hop_samples` samples."""
    missing = num_frames(len(waveform), config) * config.hop_samples - len(waveform)
    return np.pad(waveform, (0, missing))


def log_mel(waveform: np.ndarray, config: MelConfig) -> np.ndarray:
    """ln(max(mel magnitude, 1e-5)) of one clip, float32 [num_frames, M].

    Frame i is centred on sample `i * hop_samples`; before and after the clip is silence, also for
    a clip shorter than a window. librosa's frames from the clip's end on are dropped, so that
    samples are exactly frames times hop.

    Args:
      waveform: mono, float [samples], at least one.
      config: of the spectrogram.

    Raises:
      ValueError: if the waveform is not a vector of at least one float.
    """
    if waveform.ndim != 1 or not len(waveform) or waveform.dtype.kind != "f":
        raise ValueError(
            f"the waveform has shape {waveform.shape} and type {waveform.dtype}; give one clip of "
            "mono sound as a vector of floats in [-1, 1], of at least one sample."
        )
    sound = fill_hops(waveform.astype(np.float32), config)
    # librosa warns of sound shorter than its transform; what follows a clip is silence anyway.
    sound = np.pad(sound, (0, max(config.fft_samples - len(sound), 0)))
    mel = _librosa().feature.melspectrogram(
        y=sound,
        sr=config.sample_rate_hz,
        n_fft=config.fft_samples,
        hop_length=config.hop_samples,
        win_length=config.window_samples,
        window="hann",
        center=True,
        pad_mode="constant",
        power=1.0,
        n_mels=config.num_mels,
        fmin=config.min_hz,
        fmax=config.max_hz,
    )
    frames = mel.T[: num_frames(len(waveform), config)]
    return np.log(np.maximum(frames, LOWEST_MAGNITUDE)).astype(np.float32)


def normalize(log_mel: np.ndarray) -> np.ndarray:
    """What models see: the range from ln 1e-5 to 2 becomes -1 to 1, linearly; nothing is cut."""
    scaled: np.ndarray = (log_mel - LOWEST_LOG) * (2 / (HIGHEST_LOG - LOWEST_LOG)) - 1
    return scaled.astype(np.float32)


def denormalize(normalized: np.ndarray) -> np.ndarray:
    """The log-mel spectrogram whose `normalize` is given."""
    scaled: np.ndarray = (normalized + 1) * ((HIGHEST_LOG - LOWEST_LOG) / 2) + LOWEST_LOG
    return scaled.astype(np.float32)


def normalized_mel(waveform: np.ndarray, config: MelConfig) -> np.ndarray:
    """`normalize` of `log_mel`: one clip as a batch holds it, float32 [num_frames, M]."""
    return normalize(log_mel(waveform, config))


# ------------------------------------------------------------------------------
# From a mel spectrogram to a waveform without a trained vocoder.


def griffin_lim(
    mel: Float[np.ndarray, "F M"], config: MelConfig, *, num_iterations: int = 32, seed: int = 0
) -> Float[np.ndarray, "samples"]:
    """A waveform whose spectrogram comes near, by Griffin and Lim (1984), accelerated
    (Perraudin, Balazs and Sondergaard, 2013).

    Magnitudes of the frequencies are those that explain the mel bins best without being negative;
    phases are found by going back and forth between waveform and spectrogram.

    Args:
      mel: normalised, of one clip without padding.
      config: of the spectrogram.
      num_iterations: back and forth.
      seed: of the first phases.

    Returns:
      Exactly `F * hop_samples` samples, float32, cut to [-1, 1].

    Raises:
      ValueError: if the spectrogram has no frames, other bins than the config or values that are
        not finite.
    """
    _check(mel, config)
    log_mel = (mel.astype(np.float32) + 1) * ((HIGHEST_LOG - LOWEST_LOG) / 2) + LOWEST_LOG
    magnitude = _librosa().feature.inverse.mel_to_stft(
        np.exp(log_mel).T,
        sr=config.sample_rate_hz,
        n_fft=config.fft_samples,
        power=1.0,
        fmin=config.min_hz,
        fmax=config.max_hz,
    )
    # librosa has a frame more, centred on the end; see ops/sound.py.
    magnitude = np.concatenate((magnitude, magnitude[:, -1:]), axis=1)
    waveform = _librosa().griffinlim(
        magnitude,
        n_iter=num_iterations,
        hop_length=config.hop_samples,
        win_length=config.window_samples,
        n_fft=config.fft_samples,
        window="hann",
        length=len(mel) * config.hop_samples,
        pad_mode="constant",
        random_state=seed,
    )
    return np.clip(waveform, -1.0, 1.0).astype(np.float32)


def _check(mel: np.ndarray, config: MelConfig) -> None:
    if mel.shape[1] != config.num_mels or not len(mel):
        raise ValueError(
            f"the spectrogram has {len(mel)} frames of {mel.shape[1]} bins; it must have at least "
            f"one frame of {config.num_mels} (mel.num_mels)."
        )
    if not np.isfinite(mel).all():
        raise ValueError(
            "the spectrogram has values that are not finite; the model that made it is broken, try "
            "an earlier checkpoint."
        )


def _librosa() -> Any:
    return import_extra("librosa", "media", "mel spectrograms")
