"""From waveform to log-mel spectrogram."""

import dataclasses

from megatransformer_jax.config.option import ConfigError, check_options, option, rule


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
