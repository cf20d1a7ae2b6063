"""The mel loss is the mean difference of librosa's log-mel spectrograms."""

import jax.numpy as jnp
import numpy as np

from megatransformer_jax.config.audio import MelConfig
from megatransformer_jax.data.mel import log_mel
from megatransformer_jax.losses.sound import mel_loss

MEL = MelConfig(sample_rate_hz=1000, num_mels=4, fft_samples=64, window_samples=64, hop_samples=16)


def test_it_is_the_mean_over_the_frames_of_each_clip() -> None:
    made, true = np.random.default_rng(0).uniform(-1, 1, (2, 2, 96)).astype(np.float32)
    made[1, 64:] = true[1, 64:] = 0
    frames = [6, 4]
    wanted = [
        np.mean(np.abs(log_mel(m[: f * 16], MEL) - log_mel(t[: f * 16], MEL)))
        for m, t, f in zip(made, true, frames, strict=True)
    ]
    losses = mel_loss(jnp.array(made), jnp.array(true), jnp.array(frames), MEL)
    np.testing.assert_allclose(losses, wanted, rtol=1e-3)
    none = mel_loss(jnp.array(made), jnp.array(true), jnp.array([0, 4]), MEL)
    np.testing.assert_allclose(none, [0, wanted[1]], rtol=1e-3)
