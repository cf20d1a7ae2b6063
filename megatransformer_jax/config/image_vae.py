"""The autoencoder that makes small latents of images."""

import dataclasses

from megatransformer_jax.config.option import ConfigError, check_options, option, rule


@dataclasses.dataclass(frozen=True)
class ImageVaeConfig:
    """Convolutional encoder and decoder; each resolution but the first halves the sides."""

    base_width: int = option(32, "Channels at full resolution.", minimum=1)
    width_multipliers: tuple[int, ...] = option(
        (1, 2), "Channels of each resolution over base_width; one item per resolution.", minimum=1
    )
    blocks_per_level: int = option(1, "Residual blocks of each resolution.", minimum=1)
    latent_channels: int = option(4, "Channels of a latent.", minimum=1)
    norm_groups: int = option(8, "Groups of the group norms.", minimum=1)

    def __post_init__(self) -> None:
        check_options(self)

    @rule("base_width", "norm_groups")
    def _groups_divide_the_width(self) -> None:
        """norm_groups divides base_width."""
        if self.base_width % self.norm_groups:
            raise ConfigError(
                "base_width",
                f"{self.base_width} is not divisible by norm_groups={self.norm_groups}; change "
                "either.",
            )

    @rule("width_multipliers")
    def _there_is_a_resolution(self) -> None:
        """At least one item."""
        if not self.width_multipliers:
            raise ConfigError("width_multipliers", "() has no resolution; give at least one item.")

    @property
    def shrinkage(self) -> int:
        """Sides of an image over those of its latent."""
        return 2 ** (len(self.width_multipliers) - 1)

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """Height, width and channels of the latent of an image of these sides."""
        return height // self.shrinkage, width // self.shrinkage, self.latent_channels


@dataclasses.dataclass(frozen=True)
class ImageVaeTrainingConfig:
    """The loss of an image autoencoder."""

    kl_weight: float = option(
        1e-3,
        "Weight of the KL divergence of latents from a standard normal, in nats per latent value, "
        "beside the mean squared error of the pixels.",
        minimum=0,
    )

    def __post_init__(self) -> None:
        check_options(self)
