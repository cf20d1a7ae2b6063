"""The transform equals librosa's; lengths are exact; gradients are finite."""

import jax
import jax.numpy as jnp
import librosa
import numpy as np
import pytest

from megatransformer_jax.ops.sound import (
    hann_window,
    inverse_stft,
    num_frames,
    stft,
    stft_magnitude,
)

# fft, window, hop: usual; a shorter window; a hop that does not divide; windows hardly overlap.
SIZES = [(64, 64, 16), (64, 40, 16), (32, 31, 12), (32, 32, 31)]
# librosa warns of clips that are shorter than the transform.
pytestmark = pytest.mark.filterwarnings("ignore:n_fft:UserWarning")
# Compiled whole: one by one, operations take longer to compile.
compiled_stft = jax.jit(stft, static_argnums=(1, 2, 3))
compiled_inverse = jax.jit(inverse_stft, static_argnums=(1, 2))


def noise(samples, seed=0):
    return np.random.default_rng(seed).normal(size=(2, samples)).astype(np.float32)


@pytest.mark.parametrize(
    ("fft", "window", "hop", "samples"), [(*sizes, 95) for sizes in SIZES] + [(64, 64, 16, 1)]
)
def test_frames_are_librosas_without_the_last(fft, window, hop, samples):
    waveform = noise(samples)
    frames = num_frames(samples, hop)
    filled = np.pad(waveform, ((0, 0), (0, frames * hop - samples)))
    expected = librosa.stft(
        filled, n_fft=fft, win_length=window, hop_length=hop, center=True, pad_mode="constant"
    )
    ours = compiled_stft(jnp.asarray(waveform), fft, window, hop)
    assert ours.shape == (2, frames, fft // 2 + 1)
    np.testing.assert_allclose(ours, expected.transpose(0, 2, 1)[:, :frames], atol=2e-5)


@pytest.mark.parametrize(("fft", "window", "hop"), SIZES[:3])
def test_the_inverse_gives_the_waveform_back_with_its_exact_length(fft, window, hop):
    waveform = noise(20 * hop)
    back = jax.jit(lambda x: inverse_stft(stft(x, fft, window, hop), window, hop))(waveform)
    assert back.shape == waveform.shape
    whole = 20 * hop - fft // 2
    np.testing.assert_allclose(back[:, :whole], waveform[:, :whole], atol=1e-4)


def test_silence_has_a_finite_gradient_and_a_floor():
    silence = jnp.zeros((1, 64)).at[0, 40].set(0.5)
    slope = jax.jit(jax.grad(lambda x: stft_magnitude(x, 16, 16, 8).sum()))
    gradient = slope(silence)
    assert np.isfinite(gradient).all()
    assert np.abs(gradient).max() > 0
    both = jax.jit(lambda x: [stft_magnitude(x, 16, 16, 8, floor) for floor in (0.1, 0.0)])
    floored, plain = both(silence)
    assert floored.min() == jnp.float32(0.1)
    np.testing.assert_allclose(floored, np.maximum(plain, 0.1), rtol=1e-6)


def test_a_window_longer_than_the_transform_is_an_error():
    with pytest.raises(ValueError, match="window_samples=9 exceeds fft_samples=8"):
        hann_window(9, 8)


def test_frames_beyond_a_clip_do_not_reach_the_inverse():
    spectrum = compiled_stft(jnp.asarray(noise(160)), 64, 64, 16)
    alone = compiled_inverse(spectrum[:1, :6], 64, 16)
    together = compiled_inverse(spectrum, 64, 16, jnp.asarray([6, 10]))
    assert together.shape == (2, 160)
    np.testing.assert_allclose(together[0, :96], alone[0], atol=1e-6)
    np.testing.assert_array_equal(together[0, 96:], 0.0)
    np.testing.assert_allclose(together[1], compiled_inverse(spectrum, 64, 16)[1], atol=1e-6)
