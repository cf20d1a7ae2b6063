"""How far a waveform's spectrogram is from another's, at several resolutions."""

from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from megatransformer_jax.ops.sound import stft_magnitude

# Below, magnitudes are silence: their logarithm is that of the floor.
MAGNITUDE_FLOOR = 1e-5
# Frames of a clip's transform per window.
OVERLAP = 4


def stft_loss(
    predicted: Float[Array, "N samples"],
    target: Float[Array, "N samples"],
    num_samples: Int[Array, "N"],
    fft_samples: int,
) -> Float[Array, "N"]:
    """Spectral convergence plus mean log-magnitude distance of each clip, at one resolution.

    With magnitudes S of the target and P: |S - P| / |S| (Frobenius norms) + mean |ln S - ln P|
    (arXiv 1910.11480). The Hann window has `fft_samples`, a quarter of which is the hop. Frames
    that begin beyond a clip do not count.

    Args:
      predicted: 0 beyond each clip.
      target: the same.
      num_samples: of each clip.
      fft_samples: length of the transform.

    Returns:
      The loss of each clip; 0 for an empty one.
    """
    hop = fft_samples // OVERLAP
    ours, theirs = (
        stft_magnitude(x, fft_samples, fft_samples, hop, floor=MAGNITUDE_FLOOR)
        for x in (predicted, target)
    )
    num_frames = -(-num_samples // hop)
    counts = (jnp.arange(ours.shape[1]) < num_frames[:, None])[..., None]
    difference = jnp.sum(jnp.square(theirs - ours) * counts, axis=(1, 2))
    energy = jnp.sum(jnp.square(theirs) * counts, axis=(1, 2))
    is_different = difference > 0  # The square root's slope is infinite at 0.
    distance = jnp.where(is_different, jnp.sqrt(jnp.where(is_different, difference, 1.0)), 0.0)
    convergence = distance / jnp.sqrt(jnp.maximum(energy, MAGNITUDE_FLOOR**2))
    logs = jnp.sum(jnp.abs(jnp.log(theirs) - jnp.log(ours)) * counts, axis=(1, 2))
    return convergence + logs / jnp.maximum(num_frames * ours.shape[-1], 1)


def multi_resolution_stft_loss(
    predicted: Float[Array, "N samples"],
    target: Float[Array, "N samples"],
    num_samples: Int[Array, "N"],
    fft_samples: Sequence[int],
) -> Float[Array, "N"]:
    """The mean of `stft_loss` over lengths of the transform; args and shapes are its."""
    losses = [stft_loss(predicted, target, num_samples, size) for size in fft_samples]
    return sum(losses[1:], losses[0]) / len(losses)
