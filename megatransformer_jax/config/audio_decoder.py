"""How sound is made: diffusion of a mel spectrogram."""

import dataclasses

from megatransformer_jax.config.option import check_options, option


@dataclasses.dataclass(frozen=True)
class AudioDecoderConfig:
    """The decoder that makes a spectrogram, and its length, from what the core says before it."""

    loss_weight: float = option(1.0, "Weight of the decoder's loss beside the text's.", minimum=0)

    def __post_init__(self) -> None:
        check_options(self)
