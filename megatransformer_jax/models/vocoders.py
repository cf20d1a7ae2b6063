"""Vocoders, from a mel spectrogram to a waveform, and the discriminators that train against them.

Three kinds: an inverse Fourier transform at the rate of frames, transposed convolutions up to the
rate of samples, and Griffin-Lim, which has no parameters.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Complex, Float, Int, Key

from megatransformer_jax.config.audio import LOWEST_MAGNITUDE, MelConfig
from megatransformer_jax.config.vocoder import VOCODERS, DiscriminatorConfig, VocoderConfig
from megatransformer_jax.nn.norms import layer_normalize
from megatransformer_jax.nn.parameters import axes_of, vector
from megatransformer_jax.nn.vocoder_blocks import (
    ConvNextBlock,
    Convolution,
    DilatedResidualBlock,
    Upsampling,
    activate,
    leaky_relu,
    mask,
)
from megatransformer_jax.ops.sound import denormalize, inverse_stft, mel_filters, stft
from megatransformer_jax.types import DTypePolicy

# ------------------------------------------------------------------------------
# A vocoder that works at the rate of frames and ends in an inverse Fourier transform.

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


# ------------------------------------------------------------------------------
# A vocoder of transposed convolutions and dilated residual blocks, up to the rate of samples.


class HifiganGenerator(nn.Module):
    """HiFi-GAN's generator (arXiv 2010.05646): after each upsampling the mean of residual blocks
    of several kernels, so that several ranges are seen at once."""

    config: VocoderConfig
    policy: DTypePolicy

    @nn.compact
    def __call__(
        self, mels: Float[Array, "N F M"], lengths: Int[Array, "N"]
    ) -> Float[Array, "N samples"]:
        """Waveforms of `F * hop_samples` samples in [-1, 1], 0 beyond each clip.

        Args:
          mels: normalised; what is beyond a clip is not read.
          lengths: frames of each clip.
        """
        config, width, rate = self.config.hifigan, self.config.width, 1

        def is_valid() -> Array:
            steps = jnp.arange(mels.shape[1] * rate)
            return (steps < lengths[:, None] * rate)[..., None]

        x = Convolution(width, 7, self.policy, name="input")(mask(mels, is_valid()))
        x = mask(x, is_valid())
        for stage, factor in enumerate(config.upsample_rates):
            rate, width = rate * factor, width // 2
            x = activate(config.activation, f"snake_{stage}")(x)
            x = mask(Upsampling(width, factor, self.policy, name=f"up_{stage}")(x), is_valid())
            blocks = [
                DilatedResidualBlock(
                    size,
                    config.dilations,
                    config.activation,
                    self.policy,
                    name=f"block_{stage}_{index}",
                )(x, is_valid())
                for index, size in enumerate(config.kernel_sizes)
            ]
            x = sum(blocks[1:], blocks[0]) / len(blocks)
        x = activate(config.activation, "snake_output")(x)
        x = Convolution(1, 7, self.policy, name="output")(x).astype(jnp.float32)
        return mask(jnp.tanh(x), is_valid())[..., 0]


# ------------------------------------------------------------------------------
# A spectrum from a mel spectrogram alone, by fast Griffin-Lim on the device.
#
# Where clips end they are followed by zeros, and what is beyond never changes them. The same on the
# host, as a reference, is `data/mel.py`.

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


# ------------------------------------------------------------------------------
# A discriminator that hears a waveform at one rate (MelGAN, arXiv 1910.06711).

# Channels relative to the first, kernel and stride of each convolution.
_LAYERS = ((1, 15, 1), (2, 21, 4), (4, 21, 4), (8, 21, 4))


class ScaleDiscriminator(nn.Module):
    """Strided convolutions."""

    width: int
    policy: DTypePolicy

    @nn.compact
    def __call__(self, waveforms: Float[Array, "N samples"]) -> list[Array]:
        """Outputs of the convolutions, [N, ...] each; the last has one channel."""
        x = waveforms[..., None]
        features = []
        for index, (multiple, kernel, stride) in enumerate(_LAYERS):
            x = leaky_relu(
                Convolution(
                    multiple * self.width, kernel, self.policy, stride, name=f"strided_{index}"
                )(x)
            )
            features.append(x)
        x = leaky_relu(Convolution(x.shape[-1], 5, self.policy, name="plain")(x))
        return [*features, x, Convolution(1, 3, self.policy, name="score")(x)]


def half_rate(waveforms: Float[Array, "N samples"]) -> Float[Array, "N half"]:
    """Means of two samples; of an odd number the last is left out."""
    even = waveforms.shape[1] // 2 * 2
    return waveforms[:, :even].reshape(len(waveforms), -1, 2).mean(axis=-1)


# ------------------------------------------------------------------------------
# A discriminator that hears every p-th sample (HiFi-GAN, arXiv 2010.05646).

# Channels relative to the first, each convolution with a stride of 3.
_MULTIPLES = (1, 2, 4, 8)


class PeriodDiscriminator(nn.Module):
    """The waveform folded into `period` columns, each seen by the same convolutions."""

    period: int
    width: int
    policy: DTypePolicy

    @nn.compact
    def __call__(self, waveforms: Float[Array, "N samples"]) -> list[Array]:
        """Outputs of the convolutions, [N * period, ...] each; the last has one channel."""
        num_media, samples = waveforms.shape
        rows = -(-samples // self.period)
        x = jnp.pad(waveforms, ((0, 0), (0, rows * self.period - samples)))
        x = x.reshape(num_media, rows, self.period).swapaxes(1, 2).reshape(-1, rows, 1)
        features = []
        for index, multiple in enumerate(_MULTIPLES):
            x = leaky_relu(
                Convolution(
                    multiple * self.width, 5, self.policy, stride=3, name=f"strided_{index}"
                )(x)
            )
            features.append(x)
        x = leaky_relu(Convolution(x.shape[-1], 5, self.policy, name="plain")(x))
        return [*features, x, Convolution(1, 3, self.policy, name="score")(x)]


# ------------------------------------------------------------------------------
# All discriminators of a vocoder as one module.

# Of one discriminator, all its convolutions in order; the last one's output is the score.
Features = list[Array]


class Discriminators(nn.Module):
    """Multi-period (arXiv 2010.05646) and multi-scale (arXiv 1910.06711) discriminators."""

    config: DiscriminatorConfig
    policy: DTypePolicy

    @nn.compact
    def __call__(self, waveforms: Float[Array, "N samples"]) -> list[Features]:
        """The features of every discriminator; see `Features`."""
        config = self.config
        outputs = [
            PeriodDiscriminator(period, config.width, self.policy, name=f"period_{period}")(
                waveforms
            )
            for period in config.periods
        ]
        for scale in range(config.num_scales):
            if scale:
                waveforms = half_rate(waveforms)
            discriminator = ScaleDiscriminator(config.width, self.policy, name=f"scale_{scale}")
            outputs.append(discriminator(waveforms))
        return outputs


# ------------------------------------------------------------------------------
# From a config to a vocoder, and to the discriminators it may be trained against.

GENERATOR, DISCRIMINATOR = "generator", "discriminator"


def build_generator(
    config: VocoderConfig, policy: DTypePolicy
) -> IstftGenerator | HifiganGenerator:
    """From (mels [N, F, M], lengths [N]) to waveforms [N, F * hop_samples].

    Raises:
      ValueError: if the kind is unknown.
    """
    match config.kind:
        case "istft":
            return IstftGenerator(config, policy)
        case "hifigan":
            return HifiganGenerator(config, policy)
    raise ValueError(f"unknown vocoder {config.kind!r}; known: {', '.join(VOCODERS)}")


def build_discriminators(config: VocoderConfig, policy: DTypePolicy) -> Discriminators | None:
    """What the generator is trained against, or None."""
    options = config.discriminator
    return Discriminators(options, policy) if options.enabled else None


def init_vocoder(config: VocoderConfig, policy: DTypePolicy, key: Key[Array, ""]) -> Any:
    """Fresh parameters: {'generator': ..., and with discriminators 'discriminator': ...}."""
    return nn.meta.unbox(_init_boxed(config, policy, key))


def vocoder_axes(config: VocoderConfig, policy: DTypePolicy) -> Any:
    """Logical axis names of every parameter, in the tree of `init_vocoder`."""
    return axes_of(jax.eval_shape(lambda key: _init_boxed(config, policy, key), jax.random.key(0)))


def _init_boxed(config: VocoderConfig, policy: DTypePolicy, key: Key[Array, ""]) -> Any:
    frames = config.segment_frames
    generator_key, discriminator_key = jax.random.split(key)
    mels = jnp.zeros((1, frames, config.mel.num_mels))
    lengths = jnp.full(1, frames)
    generator = build_generator(config, policy)
    params = {GENERATOR: generator.init(generator_key, mels, lengths)["params"]}
    discriminators = build_discriminators(config, policy)
    if discriminators is not None:
        waveform = jnp.zeros((1, frames * config.mel.hop_samples))
        params[DISCRIMINATOR] = discriminators.init(discriminator_key, waveform)["params"]
    return params
