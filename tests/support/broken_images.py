"""Broken rules of the options of images, for config_rules_test.py."""

from typing import Any

from megatransformer_jax.config.decoders import (
    DitConfig,
    FlowConfig,
    FlowSamplerConfig,
    SamplerConfig,
    UNetConfig,
)
from megatransformer_jax.config.image import ImageConfig, ImageDecoderConfig, ImageVaeConfig

DEEP = UNetConfig(width_multipliers=(1, 1, 1, 1))
DEEP_VAE = ImageVaeConfig(width_multipliers=(1, 1, 1))
UNBOUND = SamplerConfig(threshold="none")

# The rule, the class, what is given, the path in the error.
BROKEN_IMAGES: list[tuple[str, type, dict[str, Any], str]] = [
    ("_heads_and_groups_divide_the_width", UNetConfig, {"head_width": 5}, "base_width"),
    ("_heads_and_groups_divide_the_width", UNetConfig, {"norm_groups": 5}, "base_width"),
    (
        "_levels_exist",
        UNetConfig,
        {"width_multipliers": (), "attention_levels": ()},
        "width_multipliers",
    ),
    ("_levels_exist", UNetConfig, {"attention_levels": (2,)}, "attention_levels"),
    ("_levels_exist", UNetConfig, {"attention_levels": (1, 1)}, "attention_levels"),
    ("_eta_needs_ddim", SamplerConfig, {"sampler": "ddpm", "eta": 0.5}, "eta"),
    ("_quantile_needs_dynamic", SamplerConfig, {"threshold_quantile": 0.9}, "threshold_quantile"),
    (
        "_normal_needs_logit_normal",
        FlowConfig,
        {"time_draw": "uniform", "time_std": 2.0},
        "time_std",
    ),
    ("_width_suits_positions_and_heads", DitConfig, {"width": 62, "num_heads": 2}, "width"),
    ("_width_suits_positions_and_heads", DitConfig, {"num_heads": 3}, "width"),
    ("_groups_divide_the_width", ImageVaeConfig, {"norm_groups": 5}, "base_width"),
    (
        "_there_is_a_resolution",
        ImageVaeConfig,
        {"width_multipliers": ()},
        "width_multipliers",
    ),
    (
        "_sections_are_of_the_kind",
        ImageDecoderConfig,
        {"flow_sampler": FlowSamplerConfig(num_steps=3)},
        "flow_sampler.num_steps",
    ),
    (
        "_sections_are_of_the_kind",
        ImageDecoderConfig,
        {"kind": "dit", "unet": DEEP},
        "unet.width_multipliers",
    ),
    (
        "_autoencoder_needs_a_run",
        ImageDecoderConfig,
        {"vae_model": DEEP_VAE},
        "vae_model.width_multipliers",
    ),
    ("_latents_have_no_range", ImageDecoderConfig, {"vae": "runs/vae"}, "sampler.threshold"),
    (
        "_steps_are_times",
        ImageDecoderConfig,
        {"sampler": SamplerConfig(num_steps=1001)},
        "sampler.num_steps",
    ),
    ("_patches_fill_the_image", ImageConfig, {"height": 30}, "height"),
    ("_patches_fill_the_image", ImageConfig, {"width": 30}, "width"),
    (
        "_decoder_divides_the_image",
        ImageConfig,
        {"enabled": True, "height": 28, "decoder": ImageDecoderConfig(unet=DEEP)},
        "height",
    ),
    (
        "_decoder_divides_the_image",
        ImageConfig,
        {
            "enabled": True,
            "width": 36,
            "decoder": ImageDecoderConfig(kind="dit", dit=DitConfig(patch_size=8)),
        },
        "width",
    ),
    (
        "_decoder_divides_the_image",
        ImageConfig,
        {
            "enabled": True,
            "width": 36,
            "decoder": ImageDecoderConfig(sampler=UNBOUND, vae="runs/vae", vae_model=DEEP_VAE),
        },
        "width",
    ),
]
