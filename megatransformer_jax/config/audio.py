"""Sound in the model: its mel spectrogram, its encoder, its decoder."""

import dataclasses
import math

from megatransformer_jax.config.decoders import (
    DiffusionConfig,
    SamplerConfig,
    check_steps,
    coda_queries_option,
)
from megatransformer_jax.config.option import ConfigError, check_options, option, rule, section

# ------------------------------------------------------------------------------
# How sound is made: diffusion of a mel spectrogram of a length that the condition tells.


@dataclasses.dataclass(frozen=True)
class AudioDecoderConfig:
    """The decoder that makes a spectrogram, and its length, from what the core says before it."""

    loss_weight: float = option(
        1.0, "Weight of the decoder's loss relative to the text loss.", minimum=0
    )
    duration_weight: float = option(
        0.1, "Weight of the length's loss within the decoder's.", minimum=0
    )
    condition_dropout_rate: float = option(
        0.1,
        "Share of clips that are trained without their condition, which guidance requires.",
        minimum=0,
        maximum=1,
    )
    width: int = option(128, "Channels of the network.", minimum=2)
    head_width: int = option(32, "Channels of an attention head.", minimum=2)
    dilations: tuple[int, ...] = option(
        (1, 2, 4, 1),
        "Frames between the taps of each block's convolutions; one item per block.",
        minimum=1,
    )
    diffusion: DiffusionConfig = section(DiffusionConfig, "Training.")
    sampler: SamplerConfig = section(SamplerConfig, "Making sound.")

    def __post_init__(self) -> None:
        check_options(self)

    @rule("width", "head_width")
    def _heads_divide_the_width(self) -> None:
        """head_width divides width and is even, as rotary positions need it."""
        if self.width % self.head_width:
            raise ConfigError(
                "width",
                f"{self.width} is not divisible by head_width={self.head_width}; change either.",
            )
        if self.head_width % 2:
            raise ConfigError(
                "head_width",
                f"{self.head_width} is odd, but rotary positions rotate pairs; make it even.",
            )

    @rule("sampler.num_steps", "diffusion.num_times")
    def _steps_are_times(self) -> None:
        """sampler.num_steps is at most diffusion.num_times."""
        check_steps(self.sampler, self.diffusion)

    @rule("dilations")
    def _has_blocks(self) -> None:
        """At least one."""
        if not self.dilations:
            raise ConfigError("dilations", "() has no blocks; give at least one item.")


# ------------------------------------------------------------------------------
# From waveform to log-mel spectrogram.

# Magnitudes below are raised to it before the logarithm.
LOWEST_MAGNITUDE = 1e-5
# Natural logarithms that normalisation maps to -1 and 1.
LOWEST_LOG = math.log(LOWEST_MAGNITUDE)
HIGHEST_LOG = 2.0


@dataclasses.dataclass(frozen=True)
class MelConfig:
    """A mel spectrogram as librosa makes it: Slaney's scale and norm, magnitudes, natural log."""

    sample_rate_hz: int = option(16000, "Samples per second.", minimum=1)
    num_mels: int = option(80, "Mel bins (M).", minimum=1)
    fft_samples: int = option(1024, "Length of the Fourier transform.", minimum=2)
    window_samples: int = option(1024, "Length of the Hann window.", minimum=2)
    hop_samples: int = option(256, "Samples between frames.", minimum=1)
    min_hz: float = option(0.0, "Lower edge of the lowest bin.", minimum=0)
    max_hz: float | None = option(
        None, "Upper edge of the highest bin. Default (None): half the rate.", above=0
    )

    def __post_init__(self) -> None:
        check_options(self)

    @rule("window_samples")
    def _window_fits_the_transform(self) -> None:
        """At most fft_samples."""
        if self.window_samples > self.fft_samples:
            raise ConfigError(
                "window_samples",
                f"{self.window_samples} exceeds fft_samples={self.fft_samples}; lower it or raise "
                "fft_samples.",
            )

    @rule("hop_samples")
    def _windows_overlap(self) -> None:
        """At most window_samples, or samples between windows would be lost."""
        if self.hop_samples > self.window_samples:
            raise ConfigError(
                "hop_samples",
                f"{self.hop_samples} exceeds window_samples={self.window_samples}, so that samples "
                "would be lost; lower it.",
            )

    @rule("max_hz", "min_hz")
    def _band_is_below_nyquist(self) -> None:
        """min_hz < max_hz <= sample_rate_hz / 2."""
        nyquist = self.sample_rate_hz / 2
        if self.max_hz is not None and self.max_hz > nyquist:
            raise ConfigError(
                "max_hz", f"{self.max_hz} exceeds half of sample_rate_hz, {nyquist}; lower it."
            )
        if self.min_hz >= (self.max_hz or nyquist):
            raise ConfigError(
                "min_hz",
                f"{self.min_hz} is not below the upper edge {self.max_hz or nyquist}; lower it.",
            )

    @rule("num_mels", "fft_samples")
    def _every_bin_has_a_frequency(self) -> None:
        """At least one frequency of the transform lies within each mel bin."""
        edges = self.edges_hz()
        spacing = self.sample_rate_hz / self.fft_samples
        for lower, upper in zip(edges, edges[2:], strict=False):
            if (math.floor(lower / spacing) + 1) * spacing >= upper:
                raise ConfigError(
                    "num_mels",
                    f"{self.num_mels} bins are too narrow: none of the transform's frequencies, "
                    f"{spacing:.4g} Hz apart, is between {lower:.4g} and {upper:.4g} Hz; lower "
                    "num_mels or raise fft_samples.",
                )

    def edges_hz(self) -> list[float]:
        """Frequencies at equal steps of Slaney's mel scale, num_mels + 2; bin m is a triangle over
        the edges m to m + 2."""
        low, high = (_to_mel(hz) for hz in (self.min_hz, self.max_hz or self.sample_rate_hz / 2))
        step = (high - low) / (self.num_mels + 1)
        return [_to_hz(low + step * edge) for edge in range(self.num_mels + 2)]


# Slaney's scale (Auditory Toolbox, 1998) is linear up to 1000 Hz and logarithmic above.
_HZ_PER_MEL = 200 / 3
_BREAK_HZ = 1000.0
_LOG_STEP = math.log(6.4) / 27


def _to_mel(hz: float) -> float:
    if hz < _BREAK_HZ:
        return hz / _HZ_PER_MEL
    return _BREAK_HZ / _HZ_PER_MEL + math.log(hz / _BREAK_HZ) / _LOG_STEP


def _to_hz(mel: float) -> float:
    above = mel - _BREAK_HZ / _HZ_PER_MEL
    return mel * _HZ_PER_MEL if above < 0 else _BREAK_HZ * math.exp(above * _LOG_STEP)


# ------------------------------------------------------------------------------
# The model's sound: encoder and decoder together.


@dataclasses.dataclass(frozen=True)
class AudioConfig:
    """Sound that the model hears and makes, as log-mel spectrograms of variable length."""

    enabled: bool = option(False, "The model hears and makes sound.")
    max_frames: int = option(
        128, "Frames of the longest clip (F); longer clips are an error.", minimum=1
    )
    downsampling: int = option(
        4, "Frames that become one token, by convolutions of stride 2; a power of two.", minimum=1
    )
    prelude_layers: int = option(1, "Layers of the audio encoder, not causal.", minimum=0)
    coda_layers: int = option(
        1, "Layers between the core and what the decoder reads, not causal.", minimum=0
    )
    context_length: int = option(
        32,
        "Positions before a clip that its coda reads, the opening token included.",
        minimum=1,
    )
    coda_queries: int | None = coda_queries_option()
    mel: MelConfig = section(MelConfig, "From waveform to spectrogram.")
    decoder: AudioDecoderConfig = section(AudioDecoderConfig, "How sound is made.")

    def __post_init__(self) -> None:
        check_options(self)

    @rule("downsampling")
    def _downsampling_is_a_power_of_two(self) -> None:
        """1, 2, 4, 8, ..."""
        if self.downsampling & (self.downsampling - 1):
            raise ConfigError(
                "downsampling",
                f"{self.downsampling} is not a power of two; set it to 1, 2, 4 or 8.",
            )

    @property
    def num_tokens(self) -> int:
        """Positions that the longest clip takes in the sequence (P)."""
        return -(-self.max_frames // self.downsampling)
