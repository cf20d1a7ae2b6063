"""Broken rules of the options of sound, for config_rules_test.py."""

from typing import Any

from megatransformer_jax.config.audio import AudioConfig, AudioDecoderConfig, MelConfig
from megatransformer_jax.config.decoders import DiffusionConfig

# The rule, the class, what is given, the path in the error.
BROKEN_AUDIO: list[tuple[str, type, dict[str, Any], str]] = [
    (
        "_window_fits_the_transform",
        MelConfig,
        {"fft_samples": 512, "window_samples": 513},
        "window_samples",
    ),
    ("_windows_overlap", MelConfig, {"hop_samples": 1025}, "hop_samples"),
    ("_band_is_below_nyquist", MelConfig, {"max_hz": 8001.0}, "max_hz"),
    ("_band_is_below_nyquist", MelConfig, {"min_hz": 8000.0}, "min_hz"),
    (
        "_every_bin_has_a_frequency",
        MelConfig,
        {"num_mels": 120, "fft_samples": 256, "window_samples": 256},
        "num_mels",
    ),
    ("_downsampling_is_a_power_of_two", AudioConfig, {"downsampling": 6}, "downsampling"),
    ("_heads_divide_the_width", AudioDecoderConfig, {"width": 48}, "width"),
    ("_heads_divide_the_width", AudioDecoderConfig, {"width": 6, "head_width": 3}, "head_width"),
    (
        "_steps_are_times",
        AudioDecoderConfig,
        {"diffusion": DiffusionConfig(num_times=9)},
        "sampler.num_steps",
    ),
    ("_has_blocks", AudioDecoderConfig, {"dilations": ()}, "dilations"),
]
