"""The diffusion transformer that draws images by flow matching."""

import dataclasses

from megatransformer_jax.config.option import ConfigError, check_options, option, rule


@dataclasses.dataclass(frozen=True)
class DitConfig:
    """A transformer over patches whose norms are scaled and shifted by the time and the condition
    (arXiv 2212.09748)."""

    width: int = option(64, "Width of a patch's vector; a multiple of 4.", minimum=4)
    num_layers: int = option(4, "Layers.", minimum=1)
    num_heads: int = option(4, "Heads of self-attention and cross-attention.", minimum=1)
    hidden_width: int = option(256, "Width inside the feed-forward layer.", minimum=1)
    patch_size: int = option(2, "Pixels, or latent places, along each side of a patch.", minimum=1)

    def __post_init__(self) -> None:
        check_options(self)

    @rule("width", "num_heads")
    def _width_suits_positions_and_heads(self) -> None:
        """width is a multiple of 4, for two sinusoids of the place, and of num_heads."""
        for name, divisor in (("4", 4), (f"num_heads={self.num_heads}", self.num_heads)):
            if self.width % divisor:
                raise ConfigError(
                    "width", f"{self.width} is not divisible by {name}; choose a multiple."
                )
