"""Each change of a clip does what it says, and leaves the rest."""

import numpy as np
import pytest

from megatransformer_jax.config.media_data import AudioAugmentationConfig
from megatransformer_jax.data.augmentation.media import augment_mel, augment_waveform

RATE = 8000
TIME = np.arange(4000) / RATE
SOUND = (0.5 * np.sin(2 * np.pi * 500 * TIME)).astype(np.float32)
MEL = np.random.default_rng(3).normal(size=(40, 16)).astype(np.float32)


def changed(seed: int = 0, max_samples: int = 10_000, **options: float) -> np.ndarray:
    config = AudioAugmentationConfig(**options)
    rng = np.random.default_rng(seed)
    return augment_waveform(SOUND, RATE, max_samples, config, rng)


def masked(seed: int = 0, **options: float) -> np.ndarray:
    return augment_mel(MEL, AudioAugmentationConfig(**options), np.random.default_rng(seed))


def test_without_options_nothing_changes() -> None:
    np.testing.assert_array_equal(changed(), SOUND)
    np.testing.assert_array_equal(masked(), MEL)


def test_speed_changes_length_and_pitch_together() -> None:
    lengths = []
    for seed in range(30):
        sound = changed(seed, max_speed=0.25)
        strongest = np.abs(np.fft.rfft(sound)).argmax() * RATE / len(sound)
        assert strongest == pytest.approx(500 * 4000 / len(sound), abs=4)
        lengths.append(len(sound))
    assert 4000 / 1.25 - 2 <= min(lengths) < 3600 and 4400 < max(lengths) <= 4000 * 1.25 + 2
    np.testing.assert_array_equal(changed(3, max_speed=0.25), changed(3, max_speed=0.25))


def test_a_clip_is_never_slowed_beyond_the_longest() -> None:
    lengths = [len(changed(seed, 4200, max_speed=0.25)) for seed in range(30)]
    assert max(lengths) <= 4200 and sum(length > 4190 for length in lengths) > 3
    # One that fills the limit is only made faster.
    assert max(len(changed(seed, 4000, max_speed=0.25)) for seed in range(30)) <= 4000


def test_gain_is_in_decibels_and_clipped_at_full_scale() -> None:
    gains = []
    for seed in range(30):
        sound = changed(seed, max_gain_db=6.0)
        gains.append(20 * np.log10(np.abs(sound).max() / 0.5))
        np.testing.assert_allclose(sound, SOUND * 10 ** (gains[-1] / 20), atol=1e-5)
    assert -6 <= min(gains) < -3 and 3 < max(gains) <= 6.02
    assert max(np.abs(changed(seed, max_gain_db=30.0)).max() for seed in range(9)) == 1


def test_noise_has_the_ratio_and_the_rate_that_are_asked_for() -> None:
    ratios = []
    for seed in range(60):
        noise = changed(seed, noise_rate=0.5, min_snr_db=10.0, max_snr_db=20.0) - SOUND
        if noise.any():
            ratios.append(10 * np.log10(np.mean(SOUND**2) / np.mean(noise**2)))
    assert 18 <= len(ratios) <= 42
    assert 9.5 < min(ratios) < 13 and 17 < max(ratios) < 20.5


def test_masks_are_stretches_of_the_mean() -> None:
    widths = set()
    for seed in range(30):
        rows = (masked(seed, time_masks=1, max_time_mask=0.25) != MEL).any(axis=1)
        (places,) = np.nonzero(rows)
        widths.add(len(places))
        assert not len(places) or np.ptp(places) == len(places) - 1
    assert max(widths) == 10 and len(widths) > 5
    image = masked(4, frequency_masks=2, max_frequency_mask=3)
    columns = (image != MEL).any(axis=0)
    assert 0 < columns.sum() <= 6
    np.testing.assert_allclose(image[:, columns], MEL.mean(), rtol=1e-6)
    np.testing.assert_array_equal(image[:, ~columns], MEL[:, ~columns])


def test_the_spectrogram_that_is_given_is_not_written_to() -> None:
    before = MEL.copy()
    masked(1, time_masks=2, frequency_masks=2)
    np.testing.assert_array_equal(MEL, before)
