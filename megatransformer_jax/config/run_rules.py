"""Rules between the sections of a run: what its kind allows, and what images and sound need."""

from typing import TYPE_CHECKING, Any

from megatransformer_jax.config.data import TokenizerConfig
from megatransformer_jax.config.option import ConfigError, require_defaults

if TYPE_CHECKING:  # run.py imports this module.
    from megatransformer_jax.config.run import RunConfig


# ------------------------------------------------------------------------------
# What a run trains, and which options have a meaning then.

RUN_KINDS = ("transformer", "vocoder", "image_vae")
# Sections that one kind alone reads.
_OWN_SECTIONS = {"vocoder": "vocoder", "image_vae": "image_vae"}
# What only a transformer has a use for, by section.
_OF_TRANSFORMERS = {
    "": ("preset", "model", "fine_tuning", "diagnostics"),
    "data": ("sequence_length", "augmentation"),
    "train": ("memory_budget_gib", "z_loss", "exit_gate", "stability"),
    "evaluation": ("final_depths",),
    "samples": ("prompts", "max_new_tokens", "temperature", "depth"),
    "checkpoint": ("best_metric",),
    "mesh": ("tensor", "sequence"),
}
# The task of data.media that names the medium which a kind is trained on.
MEDIA_TASK = {"vocoder": "speak", "image_vae": "draw"}


def check_own_sections(run: "RunConfig") -> None:
    """Checks that sections of other kinds are at their defaults.

    Raises:
      ConfigError: naming the option.
    """
    for kind, name in _OWN_SECTIONS.items():
        if run.kind != kind and hasattr(run, name):
            require_defaults(run, (name,), f"with kind={run.kind!r}", f"set kind={kind!r}")


def check_no_transformer(run: "RunConfig") -> None:
    """Checks that options of transformers are at their defaults in runs of other kinds.

    Raises:
      ConfigError: naming the option.
    """
    if run.kind == "transformer":
        return
    for name, options in _OF_TRANSFORMERS.items():
        section = getattr(run, name) if name else run
        try:
            require_defaults(section, options, f"with kind={run.kind!r}", "set kind='transformer'")
        except ConfigError as error:
            raise error.below(name) from None


def check_media_source(run: "RunConfig") -> None:
    """Checks that a run of another kind than transformers reads media, and only its medium.

    Raises:
      ConfigError: naming the option.
    """
    if run.kind == "transformer":
        return
    data, task = run.data, (f"{MEDIA_TASK[run.kind]}=1",)
    if data.source != "media":
        raise ConfigError(
            "data.source", f"{data.source!r} does not go with kind={run.kind!r}; set it to 'media'."
        )
    if data.media.tasks != task:
        raise ConfigError(
            "data.media.tasks",
            f"{data.media.tasks!r} does not go with kind={run.kind!r}, which reads no text; set it "
            f"to {task!r}.",
        )
    if data.tokenizer != TokenizerConfig(kind="bytes"):
        raise ConfigError(
            "data.tokenizer",
            f"has no use with kind={run.kind!r}, which reads no text; set its kind to 'bytes' and "
            "leave the rest at its defaults.",
        )
    medium = data.media.audio if run.kind == "vocoder" else data.media.images
    slots = "audio_per_row" if run.kind == "vocoder" else "images_per_row"
    for section, name, path in (
        (data.media, slots, "data.media"),
        (medium, "augmentation", f"data.media.{'audio' if run.kind == 'vocoder' else 'images'}"),
    ):
        try:
            require_defaults(section, (name,), f"with kind={run.kind!r}", "set kind='transformer'")
        except ConfigError as error:
            raise error.below(path) from None


# ------------------------------------------------------------------------------
# What runs with images and sound need, and what does not go with them.

# Terms and looks that run the model on text alone, by section.
_OF_TEXT = {
    "train": ("memory_budget_gib",),
    "train.stability": ("jacobian_weight",),
    "diagnostics": ("every_steps",),
    "samples": ("prompts", "max_new_tokens", "temperature"),
}


def check_media_model(run: "RunConfig") -> None:
    """Checks that the model reads media exactly if the data has them, and each kind that it reads.

    Raises:
      ConfigError: naming the option.
    """
    if run.kind != "transformer":
        return
    media, is_media = run.data.media, run.data.source == "media"
    for name, is_used in (("image", media.has_images), ("audio", media.has_audio)):
        if getattr(run.model, name).enabled and not (is_media and is_used):
            raise ConfigError(
                f"model.{name}.enabled",
                f"True, and the data has nothing of the kind (data.source={run.data.source!r}"
                + (f", data.media.tasks={media.tasks!r}" if is_media else "")
                + "); set it to False, or choose data.source='media' with a task that uses it.",
            )


def check_text_only_options(run: "RunConfig") -> None:
    """Checks that what runs the model on text alone is off in runs with media.

    Raises:
      ConfigError: naming the option.
    """
    if run.kind != "transformer" or not run.model.has_media:
        return
    reason = "with media, which it cannot take"
    for name, options in _OF_TEXT.items():
        section: Any = run
        for part in name.split("."):
            section = getattr(section, part)
        try:
            require_defaults(section, options, reason, "train on text alone")
        except ConfigError as error:
            raise error.below(name) from None
    for option, is_bad, value, wanted in (
        ("exit_gate.enabled", run.model.exit_gate.enabled, True, "False"),
        ("residual", run.model.residual == "admin", "admin", "'plain'"),
    ):
        if is_bad:
            raise ConfigError(
                f"model.{option}",
                f"{value!r} is trained on text alone so far; with media set it to {wanted}.",
            )


def check_media_samples(run: "RunConfig") -> None:
    """Checks that media are asked for only where the model makes them.

    Raises:
      ConfigError: naming the option.
    """
    if run.kind != "transformer" or not run.model.has_media:
        try:
            require_defaults(
                run.samples,
                ("num_media",),
                "without images and sound in a transformer",
                "set model.image.enabled=True or model.audio.enabled=True",
            )
        except ConfigError as error:
            raise error.below("samples") from None


def check_sequence_room(run: "RunConfig") -> None:
    """Checks that text and media together are no longer than the model's longest sequence.

    Raises:
      ConfigError: naming the option.
    """
    if run.kind != "transformer" or not run.model.has_media:
        return
    model, (images, clips) = run.model, media_places(run)
    total = run.data.sequence_length + images + clips
    if total > model.max_length:
        raise ConfigError(
            "model.max_length",
            f"{model.max_length} is less than {total}: data.sequence_length="
            f"{run.data.sequence_length}, {images} places of images, {clips} of sound; raise it.",
        )


def media_places(run: "RunConfig") -> tuple[int, int]:
    """Places that the slots of a row for images, and those for clips, take in the sequence."""
    media, model = run.data.media, run.model
    return (
        media.images_per_row * model.image.num_tokens if model.image.enabled else 0,
        media.audio_per_row * model.audio.num_tokens if model.audio.enabled else 0,
    )
