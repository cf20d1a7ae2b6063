"""The formats of images and sound that a model reads."""

import dataclasses
import typing

from megatransformer_jax.config.audio import AudioConfig
from megatransformer_jax.config.image import ImageConfig
from megatransformer_jax.config.model import ModelConfig


@dataclasses.dataclass(frozen=True)
class MediaFormats:
    """What media must look like. A medium whose section is not enabled has no slots in batches."""

    image: ImageConfig = dataclasses.field(default_factory=ImageConfig)
    audio: AudioConfig = dataclasses.field(default_factory=AudioConfig)

    @classmethod
    def of_model(cls, config: ModelConfig) -> typing.Self:
        """Those of a model."""
        return cls(config.image, config.audio)
