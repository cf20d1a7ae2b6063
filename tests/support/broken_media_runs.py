"""Broken combinations of media with other options of a run, for config_rules_test."""

import dataclasses
from typing import Any

from megatransformer_jax.config.audio import AudioConfig
from megatransformer_jax.config.data import DataConfig, TokenizerConfig
from megatransformer_jax.config.image import ImageConfig
from megatransformer_jax.config.loop import CheckpointConfig
from megatransformer_jax.config.model import ModelConfig, NormConfig
from megatransformer_jax.config.run import RunConfig

IMAGE_MODEL = ModelConfig(image=ImageConfig(enabled=True))
MEDIA = DataConfig(source="media", tokenizer=TokenizerConfig(kind="bytes"))
RUN = {"model": IMAGE_MODEL, "data": MEDIA}


def model(**changes: Any) -> ModelConfig:
    """The model with images, changed."""
    return dataclasses.replace(IMAGE_MODEL, **changes)


BROKEN_MEDIA_RUNS: list[tuple[str, type, dict[str, Any], str]] = [
    ("_media_options_need_media", ModelConfig, {"image": ImageConfig(height=64)}, "image"),
    ("_media_options_need_media", ModelConfig, {"audio": AudioConfig(max_frames=9)}, "audio"),
    (
        "_learned_weights_need_several_losses",
        ModelConfig,
        {"loss_weighting": "learned"},
        "loss_weighting",
    ),
    ("_media_models_have_media", RunConfig, {"model": IMAGE_MODEL}, "model.image.enabled"),
    (
        "_media_models_have_media",
        RunConfig,
        {"model": model(audio=AudioConfig(enabled=True)), "data": MEDIA},
        "model.audio.enabled",
    ),
    (
        "_media_go_without_text_only_options",
        RunConfig,
        RUN | {"model": model(residual="admin", norm=NormConfig(placement="post"))},
        "model.residual",
    ),
    (
        "_best_metric_is_returned",
        RunConfig,
        RUN | {"checkpoint": CheckpointConfig(best_metric="validation/audio_loss")},
        "checkpoint.best_metric",
    ),
    (
        "_sequences_with_media_fit",
        RunConfig,
        RUN | {"model": model(max_length=300)},
        "model.max_length",
    ),
]
