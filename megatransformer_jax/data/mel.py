"""Log-mel spectrograms on the host, by librosa. `ops/sound.py` makes the same on the device."""

import librosa
import numpy as np

from megatransformer_jax.config.audio import HIGHEST_LOG, LOWEST_LOG, LOWEST_MAGNITUDE, MelConfig


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
      ValueError: if the waveform is no vector of at least one float.
    """
    if waveform.ndim != 1 or not len(waveform) or waveform.dtype.kind != "f":
        raise ValueError(
            f"the waveform has shape {waveform.shape} and type {waveform.dtype}; give one clip of "
            "mono sound as a vector of floats in [-1, 1], of at least one sample."
        )
    sound = fill_hops(waveform.astype(np.float32), config)
    # librosa warns of sound shorter than its transform; what follows a clip is silence anyway.
    sound = np.pad(sound, (0, max(config.fft_samples - len(sound), 0)))
    mel = librosa.feature.melspectrogram(
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
