"""From waveform to log-mel spectrogram."""

import dataclasses
import math

from megatransformer_jax.config.option import ConfigError, check_options, option, rule

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
        None, "Upper edge of the highest bin. None: half the rate.", above=0
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
