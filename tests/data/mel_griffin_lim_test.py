"""Waveforms from spectrograms: exact length, near in sound, repeatable."""

import numpy as np
import pytest

from megatransformer_jax.config.audio import MelConfig
from megatransformer_jax.data.mel import griffin_lim, normalized_mel

CONFIG = MelConfig(
    sample_rate_hz=8000, num_mels=40, fft_samples=512, window_samples=400, hop_samples=100
)
# librosa warns of clips that are shorter than the transform.
pytestmark = pytest.mark.filterwarnings("ignore:n_fft:UserWarning")


@pytest.fixture(scope="module")
def mel():
    """A chord that gets louder."""
    seconds = np.arange(4000) / CONFIG.sample_rate_hz
    chord = sum(np.sin(2 * np.pi * hz * seconds) for hz in (300, 800, 1500))
    return normalized_mel((0.3 * seconds * chord).astype(np.float32), CONFIG)


def test_the_sound_is_near_its_length_exact_and_the_seed_decides(mel):
    waveform = griffin_lim(mel, CONFIG)
    assert waveform.shape == (len(mel) * CONFIG.hop_samples,) == (4000,)
    assert waveform.dtype == np.float32
    error = np.abs(normalized_mel(waveform, CONFIG) - mel)
    loud = mel > -0.2
    assert loud.mean() > 0.1
    # Of a range of 2; silence would be off by more than 0.8.
    assert error[loud].mean() < 0.05
    np.testing.assert_array_equal(griffin_lim(mel, CONFIG), waveform)
    assert not np.allclose(griffin_lim(mel, CONFIG, seed=1), waveform, atol=1e-3)
    few = np.abs(normalized_mel(griffin_lim(mel, CONFIG, num_iterations=1), CONFIG) - mel)
    assert few[loud].mean() > error[loud].mean()


def test_one_frame_is_enough_and_loud_sound_is_cut(mel):
    assert griffin_lim(mel[:1], CONFIG).shape == (CONFIG.hop_samples,)
    assert np.abs(griffin_lim(mel[-9:] + 1.0, CONFIG)).max() == 1.0


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (np.zeros((3, 39), np.float32), "3 frames of 39 bins; it must .* 40"),
        (np.zeros((0, 40), np.float32), "0 frames"),
        (np.full((2, 40), np.nan, np.float32), "not finite"),
    ],
)
def test_wrong_spectrograms_are_errors(wrong, message):
    with pytest.raises(ValueError, match=message):
        griffin_lim(wrong, CONFIG)
