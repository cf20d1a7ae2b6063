"""Runs of every kind by its name, and which options each kind has."""

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from typing import Any

from absl import logging

from megatransformer_jax.config.data import ClipDataConfig, PictureDataConfig
from megatransformer_jax.config.image import ImageVaeRunConfig
from megatransformer_jax.config.option import (
    ConfigError,
    nearest_hint,
    options_of,
    section,
    sections_of,
)
from megatransformer_jax.config.run import RunConfig
from megatransformer_jax.config.run_base import RUN_KINDS, BaseRunConfig, kind_option
from megatransformer_jax.config.vocoder import VocoderConfig

# ------------------------------------------------------------------------------
# Runs that train a model of one medium, without text.

_VOCODER = "The vocoder, with kind='vocoder'."
_IMAGE_VAE = "The autoencoder, with kind='image_vae'."


@dataclasses.dataclass(frozen=True)
class VocoderRunConfig(BaseRunConfig):
    """Everything that defines a run of a vocoder."""

    kind: str = kind_option("vocoder", ("vocoder",))
    data: ClipDataConfig = section(ClipDataConfig, "Data.")
    vocoder: VocoderConfig = section(VocoderConfig, _VOCODER)

    @property
    def task(self) -> str:
        """See `BaseRunConfig`."""
        return "vocoder"


@dataclasses.dataclass(frozen=True)
class VaeRunConfig(BaseRunConfig):
    """Everything that defines a run of an image autoencoder."""

    kind: str = kind_option("image_vae", ("image_vae",))
    data: PictureDataConfig = section(PictureDataConfig, "Data.")
    image_vae: ImageVaeRunConfig = section(ImageVaeRunConfig, _IMAGE_VAE)

    @property
    def task(self) -> str:
        """See `BaseRunConfig`."""
        return "image_vae"


# ------------------------------------------------------------------------------
# All kinds together: the command line and the page of options list what there is for any run.


@dataclasses.dataclass(frozen=True)
class AllOptions(RunConfig):
    """The options of every kind. It is read for its declarations; no run has them all."""

    kind: str = kind_option("transformer")
    vocoder: VocoderConfig = section(VocoderConfig, _VOCODER)
    image_vae: ImageVaeRunConfig = section(ImageVaeRunConfig, _IMAGE_VAE)


_CLASSES: dict[str, type[BaseRunConfig]] = dict(
    zip(RUN_KINDS, (RunConfig, VocoderRunConfig, VaeRunConfig), strict=True)
)
# What configurations of version 0.1 had to say in other kinds of run, besides defaults.
_SAID_BEFORE: dict[str, dict[str, Any]] = {
    kind: {"data.source": "media", "data.tokenizer.kind": "bytes", "data.media.tasks": (task,)}
    for kind, task in (("vocoder", "speak=1"), ("image_vae", "draw=1"))
}
# Tasks of media that version 0.1 had.
_TASKS_BEFORE = {"draw", "caption", "speak", "transcribe", "text"}


def run_class(values: Mapping[str, Any]) -> type[BaseRunConfig]:
    """The class of the run that nested values describe.

    Raises:
      ConfigError: if there is no such kind of run.
    """
    kind = values.get("kind", "transformer")
    if not isinstance(kind, str) or kind not in _CLASSES:
        raise ConfigError(
            "kind",
            f"{kind!r} is not allowed; {nearest_hint(str(kind), RUN_KINDS)}it must be one of "
            f"{', '.join(map(repr, RUN_KINDS))}.",
        )
    return _CLASSES[kind]


def require_transformer(config: BaseRunConfig) -> RunConfig:
    """The same, of a run that trains a transformer, for what knows no other kind.

    Raises:
      ConfigError: if the run trains something else.
    """
    if not isinstance(config, RunConfig):
        raise ConfigError(
            "kind", f"{config.kind!r}: this command needs a transformer; set it to 'transformer'."
        )
    return config


def own_values(values: Mapping[str, Any]) -> dict[str, Any]:
    """The nested values without those of other kinds of run, which must be defaults.

    Configurations of version 0.1 have the options of all kinds. Those saved by its runs may also
    have slots of media that no task fills; they are left out.

    Raises:
      ConfigError: if one of them is set, and so would be ignored.
    """
    kind = values.get("kind", "transformer")
    owner = run_class(values)
    own, others, sections = _paths(owner)
    allowed = _SAID_BEFORE.get(kind, {})

    def kept(nested: Mapping[str, Any], parent: str) -> dict[str, Any]:
        found = {}
        for name, value in nested.items():
            path = f"{parent}{name}"
            if path in sections and isinstance(value, Mapping):
                inner = kept(value, f"{path}.")
                if path in own or inner:
                    found[name] = inner
            elif path not in others:
                found[name] = value
            elif value not in (others[path], allowed.get(path, others[path])):
                raise _ignored(path, value, others[path], kind)
        return found

    return _without_empty_slots(kept(values, ""))


# What a configuration that a run of version 0.1 saved says of media; later ones say more.
_SAVED_MEDIA = {"tasks", "images_per_row", "audio_per_row", "images", "audio"}


def _without_empty_slots(values: dict[str, Any]) -> dict[str, Any]:
    """The values; of version 0.1, whose rows had at most one medium of a kind, with one slot."""
    data = values.get("data")
    media = data.get("media") if isinstance(data, Mapping) else None
    if not isinstance(media, Mapping) or media.keys() != _SAVED_MEDIA:
        return values
    one_slot = {**media, "images_per_row": 1, "audio_per_row": 1}
    if one_slot == media or not set(_task_names(media)) <= _TASKS_BEFORE:
        return values
    logging.log_first_n(
        logging.WARNING,
        "data.media: no task fills more than one slot; of the saved images_per_row=%s and "
        "audio_per_row=%s one is kept, with which a resumed run draws other noise for media that "
        "it learns to make",
        1,
        media["images_per_row"],
        media["audio_per_row"],
    )
    return {**values, "data": {**values["data"], "media": one_slot}}


def _task_names(media: Mapping[str, Any]) -> Iterator[str]:
    tasks = media["tasks"] if isinstance(media["tasks"], list | tuple) else (media["tasks"],)
    return (str(task).partition("=")[0] for task in tasks)


@functools.cache
def _paths(owner: type[BaseRunConfig]) -> tuple[set[str], dict[str, Any], set[str]]:
    """Paths of a class, defaults of the options that it lacks, paths of all sections there are."""
    own = {option.path for option in options_of(owner)} | {path for path, *_ in sections_of(owner)}
    every = {option.path: option.default for option in options_of(AllOptions)}
    others = {path: default for path, default in every.items() if path not in own}
    return own, others, {path for path, *_ in sections_of(AllOptions)}


def _ignored(path: str, value: Any, default: Any, kind: str) -> ConfigError:
    kinds = [
        repr(name)
        for name, owner in _CLASSES.items()
        if any(option.path == path for option in options_of(owner))
    ]
    return ConfigError(
        path,
        f"{value!r} would be ignored with kind={kind!r}; set kind={' or '.join(kinds)}, or leave "
        f"it at {default!r}.",
    )
