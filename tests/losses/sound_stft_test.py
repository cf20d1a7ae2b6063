"""The STFT loss equals scipy's transform put into the paper's formula; padding never counts."""

import jax
import jax.numpy as jnp
import numpy as np
import scipy.signal

from megatransformer_jax.losses.sound import MAGNITUDE_FLOOR, multi_resolution_stft_loss, stft_loss

SIZES = (16, 32)


def waveforms(samples: int, rows: int = 2) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    made, true = rng.uniform(-1, 1, (2, rows, samples)).astype(np.float32)
    return made, true


def magnitudes(waveform: np.ndarray, size: int) -> np.ndarray:
    """By scipy, [frequencies, frames]; frames are centred on each hop but the end."""
    hop = size // 4
    window = scipy.signal.get_window("hann", size)
    transform = scipy.signal.ShortTimeFFT(window, hop, fs=1.0, fft_mode="onesided")
    spectrum = transform.stft(waveform, p0=0, p1=len(waveform) // hop)
    return np.maximum(np.abs(spectrum), MAGNITUDE_FLOOR)


def expected(made: np.ndarray, true: np.ndarray, size: int) -> float:
    ours, theirs = magnitudes(made, size), magnitudes(true, size)
    convergence = np.linalg.norm(theirs - ours) / np.linalg.norm(theirs)
    return convergence + np.mean(np.abs(np.log(theirs) - np.log(ours)))


def test_it_is_the_papers_formula_at_each_resolution() -> None:
    made, true = waveforms(64)
    wanted = [[expected(m, t, size) for m, t in zip(made, true, strict=True)] for size in SIZES]
    lengths = jnp.array([64, 64])
    for size, values in zip(SIZES, wanted, strict=True):
        np.testing.assert_allclose(
            stft_loss(jnp.array(made), jnp.array(true), lengths, size), values, rtol=1e-4
        )
    mean = multi_resolution_stft_loss(jnp.array(made), jnp.array(true), lengths, SIZES)
    np.testing.assert_allclose(mean, np.mean(wanted, axis=0), rtol=1e-4)


def test_what_is_beyond_a_clip_and_equal_waveforms_count_nothing() -> None:
    made, true = waveforms(64)
    filled = [jnp.array(np.pad(x, ((0, 0), (0, 32)))) for x in (made, true)]
    lengths = jnp.array([64, 64])
    alone = multi_resolution_stft_loss(jnp.array(made), jnp.array(true), lengths, SIZES)
    np.testing.assert_allclose(
        multi_resolution_stft_loss(*filled, lengths, SIZES), alone, rtol=1e-5
    )
    empty = multi_resolution_stft_loss(*filled, jnp.array([0, 64]), SIZES)
    assert np.isfinite(empty).all()

    def own(x: jax.Array) -> jax.Array:
        return multi_resolution_stft_loss(x, filled[1], lengths, SIZES).sum()

    value, gradient = jax.value_and_grad(own)(filled[1])
    assert value == 0 and np.isfinite(gradient).all()
