"""How sound is made: diffusion of a mel spectrogram of a length that the condition tells."""

import dataclasses

from megatransformer_jax.config.diffusion import DiffusionConfig, SamplerConfig, check_steps
from megatransformer_jax.config.option import ConfigError, check_options, option, rule, section


@dataclasses.dataclass(frozen=True)
class AudioDecoderConfig:
    """The decoder that makes a spectrogram, and its length, from what the core says before it."""

    loss_weight: float = option(1.0, "Weight of the decoder's loss beside the text's.", minimum=0)
    duration_weight: float = option(
        0.1, "Weight of the length's loss within the decoder's.", minimum=0
    )
    condition_dropout_rate: float = option(
        0.1,
        "Part of the clips that are learned without their condition, as guidance needs it.",
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
