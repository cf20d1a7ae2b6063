"""How images are drawn: diffusion by a UNet, or flow matching by a transformer."""

import dataclasses

from megatransformer_jax.config.diffusion import DiffusionConfig, SamplerConfig, check_steps
from megatransformer_jax.config.dit import DitConfig
from megatransformer_jax.config.flow import FlowConfig, FlowSamplerConfig
from megatransformer_jax.config.image_vae import ImageVaeConfig
from megatransformer_jax.config.option import (
    ConfigError,
    check_options,
    option,
    require_defaults,
    rule,
    section,
)
from megatransformer_jax.config.unet import UNetConfig

# Sections that one kind alone reads.
_OWN_SECTIONS = {"unet": ("unet", "diffusion", "sampler"), "dit": ("dit", "flow", "flow_sampler")}


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
    vae: str | None = option(
        None,
        "Folder of a run with kind='image_vae', whose autoencoder makes the latents that are drawn "
        "and stays as it is. None: pixels are drawn.",
    )
    unet: UNetConfig = section(UNetConfig, "The network of kind='unet'.")
    diffusion: DiffusionConfig = section(DiffusionConfig, "Training of kind='unet'.")
    sampler: SamplerConfig = section(SamplerConfig, "Drawing with kind='unet'.")
    dit: DitConfig = section(DitConfig, "The network of kind='dit'.")
    flow: FlowConfig = section(FlowConfig, "Training of kind='dit'.")
    flow_sampler: FlowSamplerConfig = section(FlowSamplerConfig, "Drawing with kind='dit'.")
    vae_model: ImageVaeConfig = section(
        ImageVaeConfig, "The autoencoder of that run, so that a checkpoint says all."
    )

    def __post_init__(self) -> None:
        check_options(self)

    @rule("unet", "diffusion", "sampler", "dit", "flow", "flow_sampler")
    def _sections_are_of_the_kind(self) -> None:
        """At their defaults unless `kind` reads them."""
        for kind, names in _OWN_SECTIONS.items():
            if kind != self.kind:
                require_defaults(self, names, f"with kind={self.kind!r}", f"set kind={kind!r}")

    @rule("vae_model")
    def _autoencoder_needs_a_run(self) -> None:
        """At its defaults without `vae`."""
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
