"""Broken combinations of the options of media data, for config_rules_test."""

from typing import Any

from megatransformer_jax.config.data import AugmentationConfig, DataConfig, TokenizerConfig
from megatransformer_jax.config.image import ImageConfig
from megatransformer_jax.config.media_data import (
    AudioAugmentationConfig,
    AudioDataConfig,
    DocumentsDataConfig,
    ImageAugmentationConfig,
    ImageDataConfig,
    MediaDataConfig,
)
from megatransformer_jax.config.model import ModelConfig
from megatransformer_jax.config.run import RunConfig

BYTES = TokenizerConfig(kind="bytes")
MEDIA = {"source": "media", "tokenizer": BYTES}
SPEAK = MediaDataConfig(tasks=("speak=1",))

BROKEN_MEDIA_DATA: list[tuple[str, type, dict[str, Any], str]] = [
    ("_targets_need_changes", ImageAugmentationConfig, {"targets": True}, "targets"),
    (
        "_noise_range_is_one",
        AudioAugmentationConfig,
        {"noise_rate": 0.5, "min_snr_db": 40.0},
        "min_snr_db",
    ),
    ("_noise_range_is_one", AudioAugmentationConfig, {"min_snr_db": 5.0}, "min_snr_db"),
    ("_noise_range_is_one", AudioAugmentationConfig, {"max_snr_db": 50.0}, "max_snr_db"),
    ("_widths_need_masks", AudioAugmentationConfig, {"max_time_mask": 0.2}, "max_time_mask"),
    (
        "_widths_need_masks",
        AudioAugmentationConfig,
        {"max_frequency_mask": 3},
        "max_frequency_mask",
    ),
    ("_folder_goes_with_its_source", ImageDataConfig, {"source": "image_folder"}, "folder"),
    ("_folder_goes_with_its_source", ImageDataConfig, {"folder": "photos"}, "folder"),
    ("_tfds_options_need_tfds", ImageDataConfig, {"source": "tfds"}, "tfds_name"),
    ("_tfds_options_need_tfds", ImageDataConfig, {"tfds_name": "coco"}, "tfds_name"),
    ("_tfds_options_need_tfds", ImageDataConfig, {"image_field": "x"}, "image_field"),
    ("_own_options_need_their_source", ImageDataConfig, {"num_crops": 9}, "num_crops"),
    (
        "_own_options_need_their_source",
        ImageDataConfig,
        {"source": "photographs", "caption_style": "simple"},
        "caption_style",
    ),
    ("_folder_goes_with_its_source", AudioDataConfig, {"source": "audio_folder"}, "folder"),
    ("_folder_goes_with_its_source", AudioDataConfig, {"folder": "sounds"}, "folder"),
    ("_tfds_options_need_tfds", AudioDataConfig, {"source": "tfds"}, "tfds_name"),
    ("_tfds_options_need_tfds", AudioDataConfig, {"audio_field": "x"}, "audio_field"),
    ("_voices_are_named", AudioDataConfig, {"voices": ()}, "voices"),
    (
        "_own_options_need_their_source",
        AudioDataConfig,
        {"source": "tones", "pitches": (40,)},
        "pitches",
    ),
    ("_own_options_need_their_source", AudioDataConfig, {"max_words": 3}, "max_words"),
    (
        "_own_options_need_their_source",
        AudioDataConfig,
        {"source": "speech", "num_tones": 3},
        "num_tones",
    ),
    ("_clips_of_others_are_described", AudioDataConfig, {"is_voice": False}, "is_voice"),
    (
        "_clips_of_others_are_described",
        AudioDataConfig,
        {"on_wrong_audio": "convert"},
        "on_wrong_audio",
    ),
    ("_tasks_have_names_and_weights", MediaDataConfig, {"tasks": ("paint=1",)}, "tasks"),
    ("_tasks_have_names_and_weights", MediaDataConfig, {"tasks": ("draw",)}, "tasks"),
    ("_tasks_have_names_and_weights", MediaDataConfig, {"tasks": ("draw=-1",)}, "tasks"),
    ("_tasks_have_names_and_weights", MediaDataConfig, {"tasks": ("draw=inf",)}, "tasks"),
    ("_tasks_have_names_and_weights", MediaDataConfig, {"tasks": ("draw=0",)}, "tasks"),
    ("_tasks_have_names_and_weights", MediaDataConfig, {"tasks": ()}, "tasks"),
    (
        "_tasks_have_names_and_weights",
        MediaDataConfig,
        {"tasks": ("draw=1", "draw=2")},
        "tasks",
    ),
    (
        "_sources_need_tasks",
        MediaDataConfig,
        {"audio": AudioDataConfig(source="tones")},
        "audio.source",
    ),
    ("_sources_need_tasks", MediaDataConfig, {"audio_per_row": 2}, "audio_per_row"),
    ("_slots_have_tasks_that_fill_them", MediaDataConfig, {"images_per_row": 2}, "images_per_row"),
    (
        "_slots_have_tasks_that_fill_them",
        MediaDataConfig,
        {"tasks": ("fewshot=1",)},
        "images_per_row",
    ),
    (
        "_slots_have_tasks_that_fill_them",
        MediaDataConfig,
        {"tasks": ("which_clip=1",)},
        "audio_per_row",
    ),
    ("_documents_have_a_folder", MediaDataConfig, {"tasks": ("documents=1",)}, "documents.folder"),
    (
        "_documents_have_a_folder",
        MediaDataConfig,
        {"documents": DocumentsDataConfig(folder="mine")},
        "documents.folder",
    ),
    (
        "_sources_need_tasks",
        MediaDataConfig,
        {"tasks": ("text=1",), "images": ImageDataConfig(on_wrong_size="resize")},
        "images.on_wrong_size",
    ),
    ("_media_section_needs_its_source", DataConfig, {"media": SPEAK}, "media.tasks"),
    (
        "_transcripts_keep_their_words",
        DataConfig,
        MEDIA
        | {
            "augmentation": AugmentationConfig(synonyms_file="words.tsv", synonym_rate=0.1),
            "media": MediaDataConfig(tasks=("speak=1", "transcribe=1")),
        },
        "augmentation.synonyms_file",
    ),
    ("_media_samples_fill_a_row_each", DataConfig, MEDIA | {"packing": "pad"}, "packing"),
    ("_media_need_a_tokenizer", DataConfig, {"source": "media"}, "tokenizer.kind"),
    (
        "_tasks_fit_the_model",
        RunConfig,
        {
            "data": DataConfig(**MEDIA, media=MediaDataConfig(tasks=("caption=1", "speak=1"))),
            "model": ModelConfig(image=ImageConfig(enabled=True)),
        },
        "data.media.tasks",
    ),
    ("_tasks_fit_the_model", RunConfig, {"data": DataConfig(**MEDIA)}, "data.media.tasks"),
]
