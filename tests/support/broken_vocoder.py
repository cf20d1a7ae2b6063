"""Broken rules of vocoders, image autoencoders and kinds of run, for config_rules_test.py."""

from typing import Any

from megatransformer_jax.config.audio import MelConfig
from megatransformer_jax.config.data import DataConfig, TokenizerConfig
from megatransformer_jax.config.image import ImageVaeRunConfig, ImageVaeTrainingConfig
from megatransformer_jax.config.loop import SampleConfig, TrainConfig
from megatransformer_jax.config.media_data import (
    AudioAugmentationConfig,
    AudioDataConfig,
    ImageAugmentationConfig,
    ImageDataConfig,
    MediaDataConfig,
)
from megatransformer_jax.config.run import RunConfig
from megatransformer_jax.config.vocoder import (
    DiscriminatorConfig,
    HifiganConfig,
    IstftConfig,
    VocoderConfig,
    VocoderLossConfig,
)

_BYTES = TokenizerConfig(kind="bytes")


def _data(task: str = "speak=1", tokenizer: TokenizerConfig = _BYTES, **media: Any) -> DataConfig:
    return DataConfig(
        source="media",
        tokenizer=tokenizer,
        media=MediaDataConfig(tasks=(task,), **media),
    )


_NOISY = AudioDataConfig(augmentation=AudioAugmentationConfig(noise_rate=0.5))
_FLIPPED = ImageDataConfig(augmentation=ImageAugmentationConfig(flip_rate=0.5))
_KIND, _MEDIUM = "_other_kinds_are_no_transformers", "_other_kinds_read_one_medium"

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
    (
        "_other_kinds_sections_are_not_set",
        RunConfig,
        {"vocoder": VocoderConfig(width=64)},
        "vocoder.width",
    ),
    (
        "_other_kinds_sections_are_not_set",
        RunConfig,
        {
            "kind": "vocoder",
            "data": _data(),
            "image_vae": ImageVaeRunConfig(loss=ImageVaeTrainingConfig(kl_weight=0.1)),
        },
        "image_vae.loss.kl_weight",
    ),
    (_KIND, RunConfig, {"kind": "vocoder", "data": _data(), "preset": "tiny"}, "preset"),
    (
        _KIND,
        RunConfig,
        {"kind": "vocoder", "data": _data(), "train": TrainConfig(z_loss=0.1)},
        "train.z_loss",
    ),
    (
        _KIND,
        RunConfig,
        {"kind": "image_vae", "data": _data("draw=1"), "samples": SampleConfig(depth=3)},
        "samples.depth",
    ),
    (_MEDIUM, RunConfig, {"kind": "vocoder"}, "data.source"),
    (_MEDIUM, RunConfig, {"kind": "vocoder", "data": _data("transcribe=1")}, "data.media.tasks"),
    (_MEDIUM, RunConfig, {"kind": "image_vae", "data": _data()}, "data.media.tasks"),
    (
        _MEDIUM,
        RunConfig,
        {"kind": "vocoder", "data": _data(tokenizer=TokenizerConfig(model_file="a.model"))},
        "data.tokenizer",
    ),
    (
        _MEDIUM,
        RunConfig,
        {"kind": "vocoder", "data": _data(audio=_NOISY)},
        "data.media.audio.augmentation.noise_rate",
    ),
    (
        _MEDIUM,
        RunConfig,
        {"kind": "image_vae", "data": _data("draw=1", images=_FLIPPED)},
        "data.media.images.augmentation.flip_rate",
    ),
    (
        _MEDIUM,
        RunConfig,
        {"kind": "vocoder", "data": _data(audio_per_row=2)},
        "data.media.audio_per_row",
    ),
]
