"""How images are drawn: diffusion by a UNet, or flow matching by a transformer."""

import dataclasses

from megatransformer_jax.config.option import check_options, option


@dataclasses.dataclass(frozen=True)
class ImageDecoderConfig:
    """The decoder that draws an image from what the core says before it."""

    kind: str = option("unet", "unet: diffusion. dit: flow matching.", choices=("unet", "dit"))
    loss_weight: float = option(1.0, "Weight of the decoder's loss beside the text's.", minimum=0)

    def __post_init__(self) -> None:
        check_options(self)
