"""The vocoder, which turns mel spectrograms into waveforms, as frozen dataclasses."""

import dataclasses
import math

from megatransformer_jax.config.audio import MelConfig
from megatransformer_jax.config.option import (
    ConfigError,
    check_options,
    option,
    require_defaults,
    rule,
    section,
)

VOCODERS = ("istft", "hifigan")


@dataclasses.dataclass(frozen=True)
class IstftConfig:
    """A generator that works on frames and ends in an inverse Fourier transform (Vocos, arXiv
    2306.00814)."""

    num_blocks: int = option(6, "ConvNeXt blocks.", minimum=1)
    kernel_size: int = option(7, "Frames that a block's convolution sees.", minimum=1)
    expansion: int = option(3, "Width inside a block relative to vocoder.width.", minimum=1)
    griffin_lim_steps: int = option(
        8,
        "Iterations of fast Griffin-Lim that make the phase which the network then corrects "
        "(as arXiv 1903.03971). 0: it makes the phase from the mel spectrogram alone.",
        minimum=0,
    )

    def __post_init__(self) -> None:
        check_options(self)

    @rule("kernel_size")
    def _kernel_has_a_middle(self) -> None:
        """Odd."""
        check_odd("kernel_size", self.kernel_size)


@dataclasses.dataclass(frozen=True)
class HifiganConfig:
    """A generator of transposed convolutions and dilated residual blocks (arXiv 2010.05646)."""

    upsample_rates: tuple[int, ...] = option(
        (8, 8, 4), "Factors of the transposed convolutions; each halves the width.", minimum=1
    )
    kernel_sizes: tuple[int, ...] = option(
        (3, 7, 11), "Residual blocks side by side after each factor, by their kernel.", minimum=1
    )
    dilations: tuple[int, ...] = option((1, 3, 5), "Of each block's convolutions.", minimum=1)
    activation: str = option(
        "leaky_relu",
        "snake: x + sin^2(a x) / a with a learned for each channel (arXiv 2006.08195).",
        choices=("leaky_relu", "snake"),
    )

    def __post_init__(self) -> None:
        check_options(self)

    @rule("kernel_sizes")
    def _kernels_have_a_middle(self) -> None:
        """Odd; at least one."""
        if not self.kernel_sizes or not self.dilations:
            name = "dilations" if self.kernel_sizes else "kernel_sizes"
            raise ConfigError(name, "() leaves blocks without convolutions; give at least one.")
        for size in self.kernel_sizes:
            check_odd("kernel_sizes", size)


@dataclasses.dataclass(frozen=True)
class VocoderLossConfig:
    """What a generated waveform is compared with the recorded one by."""

    fft_samples: tuple[int, ...] = option(
        (512, 1024, 2048),
        "Lengths of the Fourier transforms of the multi-resolution STFT loss (arXiv 1910.11480); "
        "windows have the same length and a quarter of it between them.",
        minimum=4,
    )
    stft_weight: float = option(
        1.0,
        "Weight of that loss: spectral convergence plus the mean difference of log magnitudes.",
        minimum=0,
    )
    mel_weight: float = option(
        1.0, "Weight of the mean difference of log-mel spectrograms.", minimum=0
    )

    def __post_init__(self) -> None:
        check_options(self)

    @rule("fft_samples")
    def _resolutions_can_be_used(self) -> None:
        """Divisible by 4; at least one, each once."""
        if not self.fft_samples:
            raise ConfigError("fft_samples", "() compares nothing; give at least one.")
        for size in self.fft_samples:
            if size % 4:
                raise ConfigError("fft_samples", f"{size} is not divisible by 4; use a multiple.")
        if len(set(self.fft_samples)) != len(self.fft_samples):
            raise ConfigError("fft_samples", f"{self.fft_samples!r} repeats one; name each once.")

    @rule("stft_weight", "mel_weight")
    def _something_is_compared(self) -> None:
        """Not both 0: the discriminator alone does not tie a waveform to its spectrogram."""
        if not self.stft_weight and not self.mel_weight:
            raise ConfigError("stft_weight", "0 with mel_weight=0 compares nothing; raise one.")


@dataclasses.dataclass(frozen=True)
class DiscriminatorConfig:
    """Networks that tell generated waveforms from recorded ones, trained with the generator.

    Least-squares losses (arXiv 1611.04076) and feature matching, as HiFi-GAN has them.
    """

    enabled: bool = option(False, "Trains discriminators and the generator against them.")
    periods: tuple[int, ...] = option(
        (2, 3, 5, 7, 11),
        "Multi-period discriminators: each sees every p-th sample side by side.",
        minimum=1,
    )
    num_scales: int = option(
        3,
        "Multi-scale discriminators: the first reads the waveform, each following one half the "
        "rate of the one before.",
        minimum=0,
    )
    width: int = option(
        16, "Channels of the first convolution; they double up to 8 times that.", minimum=1
    )
    weight: float = option(1.0, "Weight of the generator's adversarial loss.", above=0)
    feature_weight: float = option(2.0, "Weight of feature matching.", minimum=0)

    def __post_init__(self) -> None:
        check_options(self)

    @rule("periods", "num_scales", "width", "weight", "feature_weight")
    def _options_need_discriminators(self) -> None:
        """Keep the default with enabled=False."""
        if not self.enabled:
            require_defaults(
                self,
                ("periods", "num_scales", "width", "weight", "feature_weight"),
                "with enabled=False",
                "set enabled=True",
            )

    @rule("periods", "num_scales")
    def _there_is_a_discriminator(self) -> None:
        """At least one of either kind; each period once."""
        if not self.periods and not self.num_scales:
            raise ConfigError("periods", "() with num_scales=0 leaves none; name a period.")
        if len(set(self.periods)) != len(self.periods):
            raise ConfigError("periods", f"{self.periods!r} repeats one; name each once.")


@dataclasses.dataclass(frozen=True)
class VocoderConfig:
    """From normalised log-mel spectrograms to waveforms of exactly frames times hop samples.

    Used by runs with kind='vocoder'.
    """

    kind: str = option(
        "istft",
        "istft: works on frames, an inverse Fourier transform makes the samples; fast on CPUs. "
        "hifigan: transposed convolutions up to the rate of samples.",
        choices=VOCODERS,
    )
    width: int = option(256, "Channels at the rate of frames.", minimum=1)
    segment_frames: int = option(
        32, "Length in frames of the random clip segments used for training.", minimum=1
    )
    mel: MelConfig = section(MelConfig, "The spectrograms that it reads.")
    istft: IstftConfig = section(IstftConfig, "The generator with kind='istft'.")
    hifigan: HifiganConfig = section(HifiganConfig, "The generator with kind='hifigan'.")
    loss: VocoderLossConfig = section(VocoderLossConfig, "Losses against recorded waveforms.")
    discriminator: DiscriminatorConfig = section(DiscriminatorConfig, "Adversarial training.")

    def __post_init__(self) -> None:
        check_options(self)

    @rule("istft", "hifigan")
    def _only_the_chosen_generator_has_options(self) -> None:
        """Keep the default with the other kind."""
        for name in VOCODERS:
            if name != self.kind:
                require_defaults(self, (name,), f"with kind={self.kind!r}", f"set kind={name!r}")

    @rule("hifigan.upsample_rates")
    def _rates_make_a_hop(self) -> None:
        """With kind='hifigan' their product is mel.hop_samples; width can be halved for each."""
        if self.kind != "hifigan":
            return
        rates, hop = self.hifigan.upsample_rates, self.mel.hop_samples
        if math.prod(rates) != hop:
            raise ConfigError(
                "hifigan.upsample_rates",
                f"{rates!r} make {math.prod(rates)} samples of a frame, and mel.hop_samples={hop}; "
                "change either.",
            )
        if self.width % 2 ** len(rates):
            raise ConfigError(
                "width",
                f"{self.width} cannot be halved {len(rates)} times, once for each of "
                f"hifigan.upsample_rates; use a multiple of {2 ** len(rates)}.",
            )

    @rule("mel")
    def _frames_can_be_overlapped(self) -> None:
        """With kind='istft' mel.fft_samples is even and mel.hop_samples at most half of
        mel.window_samples, so that each sample is in a frame."""
        if self.kind != "istft":
            return
        if self.mel.fft_samples % 2:
            raise ConfigError(
                "mel.fft_samples", f"{self.mel.fft_samples} is odd, and kind='istft' needs it even."
            )
        if 2 * self.mel.hop_samples > self.mel.window_samples:
            raise ConfigError(
                "mel.hop_samples",
                f"{self.mel.hop_samples} is more than half of mel.window_samples="
                f"{self.mel.window_samples}, so that kind='istft' could not make all samples; "
                "lower it, or set kind='hifigan'.",
            )


def check_odd(name: str, value: int) -> None:
    """Raises:
    ConfigError: if a kernel's size has no middle.
    """
    if value % 2 == 0:
        raise ConfigError(name, f"{value} is even, so the kernel has no middle; make it odd.")
