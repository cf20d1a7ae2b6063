"""Sound in the model: its mel spectrogram, its encoder, its decoder."""

import dataclasses

from megatransformer_jax.config.audio_decoder import AudioDecoderConfig
from megatransformer_jax.config.mel import MelConfig
from megatransformer_jax.config.option import ConfigError, check_options, option, rule, section


@dataclasses.dataclass(frozen=True)
class AudioConfig:
    """Sound that the model hears and makes, as log-mel spectrograms of variable length."""

    enabled: bool = option(False, "The model hears and makes sound.")
    max_frames: int = option(
        128, "Frames of the longest clip (F); longer ones are an error.", minimum=1
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
        "Positions before a clip that its decoder reads, the opening token included.",
        minimum=1,
    )
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
                f"{self.downsampling} is no power of two; set it to 1, 2, 4 or 8.",
            )

    @property
    def num_tokens(self) -> int:
        """Positions that the longest clip takes in the sequence (P)."""
        return -(-self.max_frames // self.downsampling)
