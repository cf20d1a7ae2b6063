"""Images in the model: their format, their encoder, their decoder."""

import dataclasses

from megatransformer_jax.config.image_decoder import ImageDecoderConfig
from megatransformer_jax.config.option import ConfigError, check_options, option, rule, section


@dataclasses.dataclass(frozen=True)
class ImageConfig:
    """Images that the model reads and draws. All have one size; data of other sizes is an error."""

    enabled: bool = option(False, "The model reads and draws images.")
    height: int = option(32, "Pixels from top to bottom.", minimum=1)
    width: int = option(32, "Pixels from left to right.", minimum=1)
    channels: int = option(3, "1: grey, 3: RGB.", minimum=1, maximum=3)
    patch_size: int = option(
        4, "Pixels along each side of the square that one token reads.", minimum=1
    )
    prelude_layers: int = option(1, "Layers of the image encoder, not causal.", minimum=0)
    coda_layers: int = option(
        1, "Layers between the core and what the decoder reads, not causal.", minimum=0
    )
    context_length: int = option(
        32,
        "Positions before an image that its decoder reads, the opening token included.",
        minimum=1,
    )
    decoder: ImageDecoderConfig = section(ImageDecoderConfig, "How images are drawn.")

    def __post_init__(self) -> None:
        check_options(self)

    @rule("height", "width", "patch_size")
    def _patches_fill_the_image(self) -> None:
        """patch_size divides both sides."""
        for name in ("height", "width"):
            if getattr(self, name) % self.patch_size:
                raise ConfigError(
                    name,
                    f"{getattr(self, name)} is not divisible by patch_size={self.patch_size}; "
                    "change either.",
                )

    @rule("enabled", "height", "width", "decoder.unet.width_multipliers", "decoder.dit.patch_size")
    def _decoder_divides_the_image(self) -> None:
        """If enabled, sides are multiples of what the decoder needs: 2^(number of
        width_multipliers - 1), or patch_size; with decoder.vae, times the same of
        decoder.vae_model."""
        if not self.enabled:
            return
        times, reason = self.decoder.side_multiple
        for name in ("height", "width"):
            if getattr(self, name) % times:
                raise ConfigError(
                    name,
                    f"{getattr(self, name)} is not divisible by {times}, as {reason} needs; change "
                    "either.",
                )

    @property
    def shape(self) -> tuple[int, int, int]:
        """Height, width, channels."""
        return self.height, self.width, self.channels

    @property
    def drawn_shape(self) -> tuple[int, int, int]:
        """Height, width, channels of what the decoder's network draws: the image or its latent."""
        if self.decoder.vae is None:
            return self.shape
        return self.decoder.vae_model.latent_shape(self.height, self.width)

    @property
    def num_tokens(self) -> int:
        """Patches of one image, each a position of the sequence (P)."""
        return (self.height // self.patch_size) * (self.width // self.patch_size)
