"""How images are drawn: diffusion by a UNet, or flow matching by a transformer."""

import dataclasses

from megatransformer_jax.config.diffusion import DiffusionConfig, SamplerConfig
from megatransformer_jax.config.option import check_options, option, section
from megatransformer_jax.config.unet import UNetConfig


@dataclasses.dataclass(frozen=True)
class ImageDecoderConfig:
    """The decoder that draws an image from what the core says before it."""

    kind: str = option("unet", "unet: diffusion. dit: flow matching.", choices=("unet", "dit"))
    loss_weight: float = option(1.0, "Weight of the decoder's loss beside the text's.", minimum=0)
    condition_dropout_rate: float = option(
        0.1,
        "Part of the images that are learned without their condition, as guidance needs it.",
        minimum=0,
        maximum=1,
    )
    unet: UNetConfig = section(UNetConfig, "The network of kind='unet'.")
    diffusion: DiffusionConfig = section(DiffusionConfig, "Training of kind='unet'.")
    sampler: SamplerConfig = section(SamplerConfig, "Drawing with kind='unet'.")

    def __post_init__(self) -> None:
        check_options(self)
