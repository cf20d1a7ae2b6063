"""As `other_values`, for the options of media: data, models, vocoders, autoencoders."""

from typing import Any

_MEDIA = ["--config.data.source=media", "--config.data.tokenizer.kind=bytes"]
IMAGE_RUN = [*_MEDIA, "--config.model.image.enabled"]
AUDIO_RUN = [
    *_MEDIA,
    "--config.model.audio.enabled",
    "--config.data.media.tasks=('speak=1',)",
]
_IMAGES, _AUDIO = "data.media.images", "data.media.audio"


def _with(run: list[str], section: str, **options: Any) -> list[str]:
    return [*run, *(f"--config.{section}.{name}={value}" for name, value in options.items())]


_PHOTOGRAPHS = _with(IMAGE_RUN, _IMAGES, source="photographs")
_TFDS_IMAGES = _with(IMAGE_RUN, _IMAGES, source="tfds", tfds_name="x")
_TFDS_AUDIO = _with(AUDIO_RUN, _AUDIO, source="tfds", tfds_name="x")
_DOCUMENTS = _with(IMAGE_RUN, "data.media", tasks="('documents=1',)")
_IMAGE_TFDS_OPTIONS = (
    "tfds_split",
    "tfds_validation_split",
    "tfds_data_dir",
    "image_field",
    "caption_field",
)
_AUDIO_TFDS_OPTIONS = (
    "tfds_split",
    "tfds_validation_split",
    "tfds_data_dir",
    "audio_field",
    "transcript_field",
    "tfds_sample_rate_hz",
    "is_voice",
    "on_wrong_audio",
)

MEDIA_COMPANIONS: dict[str, list[str]] = {
    f"{_IMAGES}.folder": _with(IMAGE_RUN, _IMAGES, source="image_folder"),
    f"{_IMAGES}.tfds_name": _with(IMAGE_RUN, _IMAGES, source="tfds"),
    **{f"{_IMAGES}.{name}": _TFDS_IMAGES for name in _IMAGE_TFDS_OPTIONS},
    f"{_IMAGES}.num_crops": _PHOTOGRAPHS,
    f"{_IMAGES}.augmentation.targets": _with(IMAGE_RUN, f"{_IMAGES}.augmentation", flip_rate=0.5),
    "data.media.images_per_row": _with(IMAGE_RUN, "data.media", tasks="('which=1',)"),
    "data.media.audio_per_row": _with(AUDIO_RUN, "data.media", tasks="('which_clip=1',)"),
    "data.media.documents.folder": _DOCUMENTS,
    **{
        f"data.media.documents.{name}": _with(_DOCUMENTS, "data.media.documents", folder="x")
        for name in ("on_wrong_size", "on_wrong_audio")
    },
    f"{_AUDIO}.folder": _with(AUDIO_RUN, _AUDIO, source="audio_folder"),
    f"{_AUDIO}.tfds_name": _with(AUDIO_RUN, _AUDIO, source="tfds"),
    **{f"{_AUDIO}.{name}": _TFDS_AUDIO for name in _AUDIO_TFDS_OPTIONS},
    f"{_AUDIO}.max_words": _with(AUDIO_RUN, _AUDIO, source="speech"),
    **{
        f"{_AUDIO}.augmentation.{name}": _with(
            AUDIO_RUN, f"{_AUDIO}.augmentation", **{switch: value}
        )
        for name, switch, value in (
            ("min_snr_db", "noise_rate", 0.5),
            ("max_snr_db", "noise_rate", 0.5),
            ("max_time_mask", "time_masks", 1),
            ("max_frequency_mask", "frequency_masks", 1),
        )
    },
}
_DECODER = "model.image.decoder"
_DIT_RUN = _with(IMAGE_RUN, _DECODER, kind="dit")
_LATENT_RUN = [
    *_with(IMAGE_RUN, _DECODER, vae="runs/vae"),
    f"--config.{_DECODER}.sampler.threshold=none",
]
_VOCODER_RUN = ["--config.kind=vocoder"]
_HIFIGAN_RUN = _with(_VOCODER_RUN, "vocoder", kind="hifigan")
_GAN_RUN = _with(_VOCODER_RUN, "vocoder.discriminator", enabled=True)
_VAE_RUN = ["--config.kind=image_vae"]

MEDIA_COMPANIONS |= {
    "model.loss_weighting": IMAGE_RUN,
    "samples.num_media": IMAGE_RUN,
    "model.image.enabled": IMAGE_RUN,
    "model.audio.enabled": AUDIO_RUN,
    "vocoder.discriminator.enabled": _VOCODER_RUN,
    f"{_DECODER}.vae": [f"--config.{_DECODER}.sampler.threshold=none", *IMAGE_RUN],
    f"{_DECODER}.flow.time_mean": [*_DIT_RUN, f"--config.{_DECODER}.flow.time_draw=logit_normal"],
    f"{_DECODER}.flow.time_std": [*_DIT_RUN, f"--config.{_DECODER}.flow.time_draw=logit_normal"],
    f"{_DECODER}.sampler.threshold_quantile": [
        *IMAGE_RUN,
        f"--config.{_DECODER}.sampler.threshold=dynamic",
    ],
    "model.audio.decoder.sampler.threshold_quantile": [
        *AUDIO_RUN,
        "--config.model.audio.decoder.sampler.threshold=dynamic",
    ],
}
# A longer start comes before a shorter one.
MEDIA_SECTION_COMPANIONS = {
    f"{_AUDIO}.": AUDIO_RUN,
    "data.media.": IMAGE_RUN,
    f"{_DECODER}.dit.": _DIT_RUN,
    f"{_DECODER}.flow": _DIT_RUN,
    f"{_DECODER}.vae_model.": _LATENT_RUN,
    "model.image.": IMAGE_RUN,
    "model.audio.": AUDIO_RUN,
    "vocoder.hifigan.": _HIFIGAN_RUN,
    "vocoder.discriminator.": _GAN_RUN,
    "vocoder.": _VOCODER_RUN,
    "image_vae.": _VAE_RUN,
}
MEDIA_NEW_VALUES: dict[str, Any] = {
    "data.media.tasks": ("caption=1", "text=2"),
    f"{_AUDIO}.rates_wpm": (140, 150),
    f"{_AUDIO}.pitches": (40,),
    f"{_AUDIO}.augmentation.max_snr_db": 40.0,
    "model.image.channels": 1,
    f"{_DECODER}.unet.width_multipliers": (1, 2, 3),
    f"{_DECODER}.unet.attention_levels": (0,),
    f"{_DECODER}.unet.head_width": 8,
    f"{_DECODER}.vae_model.width_multipliers": (1,),
    "model.audio.decoder.dilations": (1, 3),
    "vocoder.istft.kernel_size": 9,
    "vocoder.hifigan.upsample_rates": (16, 16),
    "vocoder.hifigan.kernel_sizes": (5,),
    "vocoder.hifigan.dilations": (1, 2),
    "vocoder.loss.fft_samples": (256, 512),
    "vocoder.discriminator.periods": (2, 7),
    "image_vae.channels": 1,
    "image_vae.model.width_multipliers": (1,),
    **{
        f"{section}.mel.{name}": value
        for section in ("model.audio", "vocoder")
        for name, value in (("window_samples", 512), ("max_hz", 7600.0))
    },
}
