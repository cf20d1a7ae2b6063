"""A vocoder that works at the rate of frames and ends in an inverse Fourier transform."""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Complex, Float, Int

from megatransformer_jax.config.vocoder import VocoderConfig
from megatransformer_jax.models.vocoders.griffin_lim import (
    consistent,
    griffin_lim_phase,
    magnitude_of_mel,
    unit,
)
from megatransformer_jax.nn.norms import layer_normalize
from megatransformer_jax.nn.parameters import vector
from megatransformer_jax.nn.vocoder_blocks import ConvNextBlock, Convolution, mask
from megatransformer_jax.ops.sound import inverse_stft
from megatransformer_jax.types import DTypePolicy

# Largest change of a log magnitude.
_MAX_LOG_CHANGE = 3.0
_NORM_EPS = 1e-6


class IstftGenerator(nn.Module):
    """ConvNeXt blocks over frames that predict each frame's spectrum (Vocos, arXiv 2306.00814).

    Magnitudes are those that the mel spectrogram implies times a learned factor. Phases are
    learned, or those of a few Griffin-Lim iterations turned by a learned complex factor, which the
    network finds from where the spectrum is not yet one of a waveform (as arXiv 1903.03971).
    """

    config: VocoderConfig
    policy: DTypePolicy

    @nn.compact
    def __call__(
        self, mels: Float[Array, "N F M"], lengths: Int[Array, "N"]
    ) -> Float[Array, "N samples"]:
        """Waveforms of `F * hop_samples` samples, 0 beyond each clip.

        Args:
          mels: normalised; what is beyond a clip is not read.
          lengths: frames of each clip.
        """
        mel = self.config.mel
        is_valid = (jnp.arange(mels.shape[1]) < lengths[:, None])[..., None]
        mels = mask(mels, is_valid)
        magnitude = jax.lax.stop_gradient(mask(magnitude_of_mel(mels, mel), is_valid))
        steps = self.config.istft.griffin_lim_steps
        if steps == 0:
            changes = self._changes(mels, None, is_valid, 2 * magnitude.shape[-1])
            log_change, angle = jnp.split(changes, 2, axis=-1)
            turn = jax.lax.complex(jnp.cos(angle), jnp.sin(angle))
        else:
            phase = griffin_lim_phase(magnitude, lengths, mel, steps)
            phase, gaps = jax.lax.stop_gradient((phase, self._gaps(magnitude * phase, lengths)))
            changes = self._changes(mels, gaps, is_valid, 3 * magnitude.shape[-1])
            log_change, real, imaginary = jnp.split(changes, 3, axis=-1)
            turn = phase * jax.lax.complex(1 + real, imaginary)
        limit = _MAX_LOG_CHANGE
        spectrum = magnitude * jnp.exp(limit * jnp.tanh(log_change / limit)) * turn
        return inverse_stft(spectrum, mel.window_samples, mel.hop_samples, lengths)

    def _gaps(self, spectrum: Complex[Array, "N F bins"], lengths: jax.Array) -> jax.Array:
        """How a spectrum differs from that of its own waveform, real [N, F, 3 * bins]."""
        rebuilt = consistent(spectrum, lengths, self.config.mel)
        ratio = jnp.log(jnp.abs(rebuilt) + 1e-3) - jnp.log(jnp.abs(spectrum) + 1e-3)
        turn = unit(rebuilt) * jnp.conj(unit(spectrum))
        return jnp.concatenate([ratio, turn.real, turn.imag], axis=-1)

    def _changes(
        self, mels: jax.Array, gaps: jax.Array | None, is_valid: jax.Array, outputs: int
    ) -> jax.Array:
        """The network: float32 [N, F, outputs]."""
        config, width = self.config.istft, self.config.width
        x = Convolution(width, config.kernel_size, self.policy, name="mel_input")(mels)
        if gaps is not None:
            gaps = mask(gaps, is_valid)
            x = x + Convolution(width, 3, self.policy, name="phase_input")(gaps)
        x = mask(self._norm("input_norm", x), is_valid)
        for index in range(config.num_blocks):
            x = ConvNextBlock(
                config.kernel_size,
                config.expansion,
                1 / config.num_blocks,
                self.policy,
                name=f"block_{index}",
            )(x, is_valid)
        x = self._norm("output_norm", x)
        # Small, so that training starts from what the mel spectrogram and Griffin-Lim say.
        gain = 0.1 if gaps is not None else 1.0
        x = Convolution(outputs, 1, self.policy, gain=gain, name="output")(x)
        return x.astype(jnp.float32)

    def _norm(self, name: str, x: jax.Array) -> jax.Array:
        scale = vector(self, f"{name}_scale", nn.initializers.ones, (x.shape[-1],))
        bias = vector(self, f"{name}_bias", nn.initializers.zeros, (x.shape[-1],))
        return layer_normalize(x, scale, bias, _NORM_EPS)
