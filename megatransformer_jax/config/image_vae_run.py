"""Runs that train an image autoencoder, as a frozen dataclass."""

import dataclasses

from megatransformer_jax.config.image import ImageConfig
from megatransformer_jax.config.image_vae import ImageVaeConfig, ImageVaeTrainingConfig
from megatransformer_jax.config.option import ConfigError, check_options, option, rule, section


@dataclasses.dataclass(frozen=True)
class ImageVaeRunConfig:
    """The autoencoder and its images. Used by runs with kind='image_vae'."""

    height: int = option(32, "Pixels from top to bottom.", minimum=1)
    width: int = option(32, "Pixels from left to right.", minimum=1)
    channels: int = option(3, "1: grey, 3: RGB.", minimum=1, maximum=3)
    model: ImageVaeConfig = section(ImageVaeConfig, "The autoencoder.")
    loss: ImageVaeTrainingConfig = section(ImageVaeTrainingConfig, "What is minimised.")

    def __post_init__(self) -> None:
        check_options(self)

    @rule("height", "width")
    def _sides_can_be_halved(self) -> None:
        """Divisible by two for each resolution of the model but the first."""
        for name in ("height", "width"):
            if getattr(self, name) % self.model.shrinkage:
                raise ConfigError(
                    name,
                    f"{getattr(self, name)} is not divisible by {self.model.shrinkage}, by which "
                    "model.width_multipliers shrinks images; change either.",
                )

    @property
    def format(self) -> ImageConfig:
        """What images must look like."""
        return ImageConfig(
            height=self.height, width=self.width, channels=self.channels, patch_size=1
        )
