"""Images in the model: their format, encoder and decoder, and the autoencoder of latents."""

import dataclasses

from megatransformer_jax.config.decoders import (
    DiffusionConfig,
    DitConfig,
    FlowConfig,
    FlowSamplerConfig,
    SamplerConfig,
    UNetConfig,
    check_steps,
    coda_queries_option,
)
from megatransformer_jax.config.option import (
    ConfigError,
    check_options,
    option,
    require_defaults,
    rule,
    section,
)

# ------------------------------------------------------------------------------
# The autoencoder that makes small latents of images.


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
        "relative to the mean squared error of the pixels.",
        minimum=0,
    )

    def __post_init__(self) -> None:
        check_options(self)


# ------------------------------------------------------------------------------
# How images are drawn: diffusion by a UNet, or flow matching by a transformer.

# Sections that one kind alone reads.
_OWN_SECTIONS = {"unet": ("unet", "diffusion", "sampler"), "dit": ("dit", "flow", "flow_sampler")}


@dataclasses.dataclass(frozen=True)
class ImageDecoderConfig:
    """The decoder that draws an image from what the core says before it."""

    kind: str = option("unet", "unet: diffusion. dit: flow matching.", choices=("unet", "dit"))
    loss_weight: float = option(
        1.0, "Weight of the decoder's loss relative to the text loss.", minimum=0
    )
    condition_dropout_rate: float = option(
        0.1,
        "Share of images that are trained without their condition, which guidance requires.",
        minimum=0,
        maximum=1,
    )
    vae: str | None = option(
        None,
        "Folder of a run with kind='image_vae'. Its autoencoder stays frozen and provides the "
        "latents to draw. Default (None): the decoder draws pixels.",
    )
    unet: UNetConfig = section(UNetConfig, "The network of kind='unet'.")
    diffusion: DiffusionConfig = section(DiffusionConfig, "Training of kind='unet'.")
    sampler: SamplerConfig = section(SamplerConfig, "Drawing with kind='unet'.")
    dit: DitConfig = section(DitConfig, "The network of kind='dit'.")
    flow: FlowConfig = section(FlowConfig, "Training of kind='dit'.")
    flow_sampler: FlowSamplerConfig = section(FlowSamplerConfig, "Drawing with kind='dit'.")
    vae_model: ImageVaeConfig = section(
        ImageVaeConfig,
        "The autoencoder of that run, stored here so that a checkpoint is self-contained.",
    )

    def __post_init__(self) -> None:
        check_options(self)

    @rule("unet", "diffusion", "sampler", "dit", "flow", "flow_sampler")
    def _sections_are_of_the_kind(self) -> None:
        """Keep the default unless `kind` uses the section."""
        for kind, names in _OWN_SECTIONS.items():
            if kind != self.kind:
                require_defaults(self, names, f"with kind={self.kind!r}", f"set kind={kind!r}")

    @rule("vae_model")
    def _autoencoder_needs_a_run(self) -> None:
        """Keep the default without `vae`."""
        if self.vae is None:
            require_defaults(self, ("vae_model",), "without vae", "give the folder of its run")

    @rule("sampler.threshold")
    def _latents_have_no_range(self) -> None:
        """'none' with kind='unet' and `vae`: latents go beyond [-1, 1]."""
        if self.vae is not None and self.kind == "unet" and self.sampler.threshold != "none":
            raise ConfigError(
                "sampler.threshold",
                f"{self.sampler.threshold!r} would cut latents, which go beyond [-1, 1]; set it to "
                "'none', or vae to None.",
            )

    @rule("sampler.num_steps", "diffusion.num_times")
    def _steps_are_times(self) -> None:
        """sampler.num_steps is at most diffusion.num_times."""
        check_steps(self.sampler, self.diffusion)

    @property
    def settings(self) -> SamplerConfig | FlowSamplerConfig:
        """The sampler of the kind, as `MediaDecoder.sample` takes it."""
        return self.sampler if self.kind == "unet" else self.flow_sampler

    @property
    def side_multiple(self) -> tuple[int, str]:
        """What an image's sides must be multiples of, and the options that say so."""
        if self.kind == "unet":
            name = f"unet.width_multipliers={self.unet.width_multipliers}"
            network, reason = self.unet.shrinkage, f"decoder.{name}"
        else:
            network, reason = self.dit.patch_size, f"decoder.dit.patch_size={self.dit.patch_size}"
        if self.vae is None:
            return network, reason
        multipliers = self.vae_model.width_multipliers
        reason = f"{reason} and decoder.vae_model.width_multipliers={multipliers}"
        return network * self.vae_model.shrinkage, reason


# ------------------------------------------------------------------------------
# The model's images: encoder and decoder together.


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
        "Positions before an image that its coda reads, the opening token included.",
        minimum=1,
    )
    coda_queries: int | None = coda_queries_option()
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


# ------------------------------------------------------------------------------
# Runs that train an image autoencoder.


@dataclasses.dataclass(frozen=True)
class ImageVaeRunConfig:
    """The autoencoder and its images. Used by runs with kind='image_vae'."""

    height: int = option(32, "Pixels from top to bottom.", minimum=1)
    width: int = option(32, "Pixels from left to right.", minimum=1)
    channels: int = option(3, "1: grey, 3: RGB.", minimum=1, maximum=3)
    model: ImageVaeConfig = section(ImageVaeConfig, "The autoencoder.")
    loss: ImageVaeTrainingConfig = section(ImageVaeTrainingConfig, "The training loss.")

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
