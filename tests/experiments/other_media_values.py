"""As `other_values`, for the options of media data."""

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
    "data.media.audio_per_row": AUDIO_RUN,
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
MEDIA_SECTION_COMPANIONS = {f"{_AUDIO}.": AUDIO_RUN, "data.media.": IMAGE_RUN}
MEDIA_NEW_VALUES: dict[str, Any] = {
    "data.media.tasks": ("caption=1", "text=2"),
    f"{_AUDIO}.rates_wpm": (140, 150),
    f"{_AUDIO}.pitches": (40,),
    f"{_AUDIO}.augmentation.max_snr_db": 40.0,
}
