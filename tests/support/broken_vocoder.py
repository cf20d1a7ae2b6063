"""Broken rules of vocoders, image autoencoders and kinds of run, for config_rules_test.py."""

from typing import Any

from megatransformer_jax.config.audio import MelConfig
from megatransformer_jax.config.image import ImageVaeRunConfig
from megatransformer_jax.config.vocoder import (
    DiscriminatorConfig,
    HifiganConfig,
    IstftConfig,
    VocoderConfig,
    VocoderLossConfig,
)

# The rule, the class, what is given, the path in the error.
BROKEN_VOCODER: list[tuple[str, type, dict[str, Any], str]] = [
    ("_kernel_has_a_middle", IstftConfig, {"kernel_size": 4}, "kernel_size"),
    ("_kernels_have_a_middle", HifiganConfig, {"kernel_sizes": (3, 4)}, "kernel_sizes"),
    ("_kernels_have_a_middle", HifiganConfig, {"kernel_sizes": ()}, "kernel_sizes"),
    ("_kernels_have_a_middle", HifiganConfig, {"dilations": ()}, "dilations"),
    ("_resolutions_can_be_used", VocoderLossConfig, {"fft_samples": (30,)}, "fft_samples"),
    ("_resolutions_can_be_used", VocoderLossConfig, {"fft_samples": ()}, "fft_samples"),
    ("_resolutions_can_be_used", VocoderLossConfig, {"fft_samples": (16, 16)}, "fft_samples"),
    (
        "_something_is_compared",
        VocoderLossConfig,
        {"stft_weight": 0.0, "mel_weight": 0.0},
        "stft_weight",
    ),
    ("_options_need_discriminators", DiscriminatorConfig, {"width": 8}, "width"),
    (
        "_there_is_a_discriminator",
        DiscriminatorConfig,
        {"enabled": True, "periods": (), "num_scales": 0},
        "periods",
    ),
    (
        "_there_is_a_discriminator",
        DiscriminatorConfig,
        {"enabled": True, "periods": (2, 2)},
        "periods",
    ),
    (
        "_only_the_chosen_generator_has_options",
        VocoderConfig,
        {"hifigan": HifiganConfig(activation="snake")},
        "hifigan.activation",
    ),
    (
        "_rates_make_a_hop",
        VocoderConfig,
        {"kind": "hifigan", "hifigan": HifiganConfig(upsample_rates=(8, 8))},
        "hifigan.upsample_rates",
    ),
    ("_rates_make_a_hop", VocoderConfig, {"kind": "hifigan", "width": 12}, "width"),
    (
        "_frames_can_be_overlapped",
        VocoderConfig,
        {"mel": MelConfig(fft_samples=1025)},
        "mel.fft_samples",
    ),
    (
        "_frames_can_be_overlapped",
        VocoderConfig,
        {"mel": MelConfig(hop_samples=513)},
        "mel.hop_samples",
    ),
    ("_sides_can_be_halved", ImageVaeRunConfig, {"height": 9}, "height"),
    ("_sides_can_be_halved", ImageVaeRunConfig, {"width": 9}, "width"),
]
