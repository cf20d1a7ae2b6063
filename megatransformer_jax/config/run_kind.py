"""What a run trains, and which options have a meaning then."""

import typing

from megatransformer_jax.config.data import TokenizerConfig
from megatransformer_jax.config.option import ConfigError, require_defaults

# A RunConfig, whose file imports this one.
Run = typing.Any

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


def check_own_sections(run: Run) -> None:
    """Checks that sections of other kinds are at their defaults.

    Raises:
      ConfigError: naming the option.
    """
    for kind, name in _OWN_SECTIONS.items():
        if run.kind != kind and hasattr(run, name):
            require_defaults(run, (name,), f"with kind={run.kind!r}", f"set kind={kind!r}")


def check_no_transformer(run: Run) -> None:
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


def check_media_source(run: Run) -> None:
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
