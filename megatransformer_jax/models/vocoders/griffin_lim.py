"""A spectrum from a mel spectrogram alone, by fast Griffin-Lim on the device.

Where clips end they are followed by zeros, and what is beyond never changes them. The same on the
host, as a reference, is `data/mel.py`.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Complex, Float, Int

from megatransformer_jax.config.audio import LOWEST_MAGNITUDE, MelConfig
from megatransformer_jax.ops.sound import denormalize, inverse_stft, mel_filters, stft

# Perraudin, Balazs and Sondergaard, "A fast Griffin-Lim algorithm", 2013.
MOMENTUM = 0.99
_TINY = 1e-8


@functools.lru_cache(maxsize=16)
def inverse_filters(config: MelConfig) -> np.ndarray:
    """From mel bins to frequencies: the filters' pseudo-inverse, float32 [M, bins]."""
    inverse: np.ndarray = np.linalg.pinv(mel_filters(config).astype(np.float64))
    return inverse.astype(np.float32)


def magnitude_of_mel(mels: Float[Array, "N F M"], config: MelConfig) -> Float[Array, "N F bins"]:
    """Magnitudes whose mel spectrogram is about the given, normalised one; at least 1e-5."""
    magnitude = jnp.exp(denormalize(mels)) @ jnp.asarray(inverse_filters(config))
    return jnp.maximum(magnitude, LOWEST_MAGNITUDE)


def start_phase(num_frames: int, num_bins: int) -> Complex[Array, "F bins"]:
    """Random numbers of magnitude 1 that depend on the number of frame and bin alone."""
    keys = jax.vmap(lambda frame: jax.random.fold_in(jax.random.key(0), frame))(
        jnp.arange(num_frames)
    )
    angle = jax.vmap(lambda key: jax.random.uniform(key, (num_bins,), maxval=2 * np.pi))(keys)
    return jnp.exp(1j * angle)


def griffin_lim_phase(
    magnitude: Float[Array, "N F bins"], lengths: Int[Array, "N"], config: MelConfig, steps: int
) -> Complex[Array, "N F bins"]:
    """Numbers of magnitude 1 with which the magnitudes are nearly those of a waveform.

    Args:
      magnitude: of every frame.
      lengths: frames of each clip.
      config: of the transform.
      steps: iterations.
    """
    phase = jnp.broadcast_to(start_phase(*magnitude.shape[1:]), magnitude.shape)

    def body(_: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        phase, before = carry
        rebuilt = consistent(magnitude * phase, lengths, config)
        return unit(rebuilt + MOMENTUM * (rebuilt - before)), rebuilt

    return jax.lax.fori_loop(0, steps, body, (phase, jnp.zeros_like(phase)))[0]


def consistent(
    spectrum: Complex[Array, "N F bins"], lengths: Int[Array, "N"], config: MelConfig
) -> Complex[Array, "N F bins"]:
    """The transform of the waveform that is nearest to a spectrum."""
    waveform = inverse_stft(spectrum, config.window_samples, config.hop_samples, lengths)
    return stft(waveform, config.fft_samples, config.window_samples, config.hop_samples)


def unit(spectrum: Complex[Array, "N F bins"]) -> Complex[Array, "N F bins"]:
    """The same phases with magnitude 1 (0 where there is none)."""
    return spectrum / jnp.maximum(jnp.abs(spectrum), _TINY)
