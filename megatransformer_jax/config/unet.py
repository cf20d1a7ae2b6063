"""The UNet that draws images by diffusion."""

import dataclasses

from megatransformer_jax.config.option import ConfigError, check_options, option, rule


@dataclasses.dataclass(frozen=True)
class UNetConfig:
    """Residual convolutions at several resolutions, each half of the one before, with skips."""

    base_width: int = option(48, "Channels at full resolution.", minimum=1)
    width_multipliers: tuple[int, ...] = option(
        (1, 2), "Channels of each resolution over base_width; one item per resolution.", minimum=1
    )
    blocks_per_level: int = option(
        1, "Residual blocks of each resolution on the way down; one more on the way up.", minimum=1
    )
    attention_levels: tuple[int, ...] = option(
        (0, 1),
        "Resolutions with self-attention and cross-attention, 0 the full one. The middle always "
        "has both.",
        minimum=0,
    )
    head_width: int = option(16, "Channels of an attention head.", minimum=1)
    norm_groups: int = option(8, "Groups of the group norms.", minimum=1)

    def __post_init__(self) -> None:
        check_options(self)

    @rule("base_width", "head_width", "norm_groups")
    def _heads_and_groups_divide_the_width(self) -> None:
        """head_width and norm_groups divide base_width."""
        for name in ("head_width", "norm_groups"):
            if self.base_width % getattr(self, name):
                raise ConfigError(
                    "base_width",
                    f"{self.base_width} is not divisible by {name}={getattr(self, name)}; change "
                    "either.",
                )

    @rule("width_multipliers", "attention_levels")
    def _levels_exist(self) -> None:
        """At least one width; each attention level once, below the number of widths."""
        if not self.width_multipliers:
            raise ConfigError("width_multipliers", "() has no resolution; give at least one item.")
        levels = self.attention_levels
        if len(set(levels)) < len(levels) or any(
            level >= len(self.width_multipliers) for level in levels
        ):
            raise ConfigError(
                "attention_levels",
                f"{levels} must name each level once and be below {len(self.width_multipliers)}, "
                "the number of width_multipliers.",
            )

    @property
    def shrinkage(self) -> int:
        """Sides of an image over those of the lowest resolution."""
        return 2 ** (len(self.width_multipliers) - 1)
