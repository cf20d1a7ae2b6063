"""From a mel spectrogram to a waveform without a trained vocoder, on the host, by librosa."""

import librosa
import numpy as np
from jaxtyping import Float

from megatransformer_jax.config.audio import HIGHEST_LOG, LOWEST_LOG, MelConfig


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
    magnitude = librosa.feature.inverse.mel_to_stft(
        np.exp(log_mel).T,
        sr=config.sample_rate_hz,
        n_fft=config.fft_samples,
        power=1.0,
        fmin=config.min_hz,
        fmax=config.max_hz,
    )
    # librosa has a frame more, centred on the end; see ops/sound.py.
    magnitude = np.concatenate((magnitude, magnitude[:, -1:]), axis=1)
    waveform = librosa.griffinlim(
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
