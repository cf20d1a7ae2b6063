"""Spectrograms of the device equal those of the host, which are librosa's."""

import jax
import jax.numpy as jnp
import librosa
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatransformer_jax.config.audio import MelConfig
from megatransformer_jax.config.option import ConfigError
from megatransformer_jax.data import mel as host
from megatransformer_jax.ops import sound as device

CONFIGS = [
    MelConfig(),
    MelConfig(
        sample_rate_hz=8000, num_mels=20, fft_samples=256, window_samples=200, hop_samples=80
    ),
    MelConfig(num_mels=16, fft_samples=512, window_samples=512, min_hz=60.0, max_hz=7000.0),
]
# librosa warns of clips that are shorter than the transform.
pytestmark = pytest.mark.filterwarnings("ignore:n_fft:UserWarning")
# Compiled whole: one by one, operations take longer to compile.
log_mel = jax.jit(device.log_mel, static_argnums=1)
normalized_mel = jax.jit(device.normalized_mel, static_argnums=2)


def speechlike(samples, seed=0):
    rng = np.random.default_rng(seed)
    chirp = np.sin(np.cumsum(np.linspace(0.02, 0.8, samples)))
    return (chirp * 0.5 + rng.normal(size=samples) * 0.05).astype(np.float32)


@pytest.mark.parametrize("config", CONFIGS)
def test_device_and_host_agree(config):
    waveform = speechlike(3000)
    expected = host.log_mel(waveform, config)
    assert expected.shape == (host.num_frames(3000, config), config.num_mels)
    ours = log_mel(jnp.asarray(waveform)[None], config)[0]
    np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(
        device.normalize(ours), host.normalized_mel(waveform, config), atol=1e-4
    )


@pytest.mark.parametrize("config", CONFIGS)
def test_the_host_is_librosa_but_for_the_last_frame(config):
    waveform = speechlike(config.hop_samples * 7)
    mel = librosa.feature.melspectrogram(
        y=waveform,
        sr=config.sample_rate_hz,
        n_fft=config.fft_samples,
        hop_length=config.hop_samples,
        win_length=config.window_samples,
        power=1.0,
        n_mels=config.num_mels,
        fmin=config.min_hz,
        fmax=config.max_hz,
    )
    assert mel.shape[1] == 8
    np.testing.assert_array_equal(
        host.log_mel(waveform, config), np.log(np.maximum(mel.T[:7], 1e-5))
    )
    edges = librosa.mel_frequencies(
        config.num_mels + 2, fmin=config.min_hz, fmax=config.max_hz or config.sample_rate_hz / 2
    )
    np.testing.assert_allclose(config.edges_hz(), edges, rtol=1e-6)


@settings(max_examples=8, deadline=None)
@given(samples=st.integers(1, 800), seed=st.integers(0, 9))
def test_padding_changes_no_frame_and_lengths_are_exact(samples, seed):
    config = CONFIGS[1]
    waveform = speechlike(samples, seed)
    frames = host.num_frames(samples, config)
    filled = host.fill_hops(waveform, config)
    assert len(filled) == frames * config.hop_samples
    expected = host.normalized_mel(waveform, config)
    assert len(expected) == frames
    # Anything may be in the padding. Of one length, so that all examples share a program.
    padded = np.full((1, 800), 0.7, np.float32)
    padded[0, : len(filled)] = filled
    ours = normalized_mel(jnp.asarray(padded), jnp.asarray([frames]), config)[0]
    np.testing.assert_allclose(ours[:frames], expected, atol=1e-4)
    np.testing.assert_array_equal(ours[frames:], 0.0)


def test_normalisation_maps_the_range_and_back():
    log_mel = np.asarray([[np.log(1e-5), 2.0, 0.3, 3.0]], np.float32)
    for module, array in ((host, log_mel), (device, jnp.asarray(log_mel))):
        normalized = module.normalize(array)
        np.testing.assert_allclose(normalized[0, :2], [-1, 1], atol=1e-6)
        assert normalized[0, 3] > 1
        np.testing.assert_allclose(module.denormalize(normalized), log_mel, atol=1e-5)


def test_gradients_of_silence_are_finite():
    config = CONFIGS[1]
    gradient = jax.jit(jax.grad(lambda x: device.log_mel(x, config).sum()))(jnp.zeros((1, 160)))
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize(
    "waveform", [np.zeros((2, 100), np.float32), np.zeros(0, np.float32), np.zeros(9, np.int16)]
)
def test_what_is_no_mono_clip_is_an_error(waveform):
    with pytest.raises(ValueError, match="give one clip of mono sound as a vector of floats"):
        host.log_mel(waveform, MelConfig())


def test_bins_without_a_frequency_are_found_where_librosa_finds_them():
    narrow = {"sample_rate_hz": 16000, "fft_samples": 128, "window_samples": 128, "hop_samples": 64}
    fits = MelConfig(num_mels=20, **narrow)
    assert (device.mel_filters(fits).max(axis=0) > 0).all()
    with pytest.warns(UserWarning, match="Empty filters"):
        librosa.filters.mel(sr=16000, n_fft=128, n_mels=60)
    with pytest.raises(ConfigError, match=r"num_mels: 60 bins are too narrow.* 125 Hz apart"):
        MelConfig(num_mels=60, **narrow)
