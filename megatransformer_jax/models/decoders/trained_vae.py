"""Puts a trained autoencoder into a model that draws its latents."""

import dataclasses
from typing import Any

import jax

from megatransformer_jax.config.image import ImageConfig, ImageVaeRunConfig
from megatransformer_jax.config.option import ConfigError

# Where a model keeps it. Parameters with this name in their path are never trained.
IMAGE_VAE = "image_vae"
_PATH = ("media", "image_decoder", IMAGE_VAE)


def check_image_vae(config: ImageConfig, trained: ImageVaeRunConfig) -> None:
    """Checks that a model's autoencoder is the one of a run.

    Raises:
      ConfigError: at an option of `model.image`, with both values. Sides may differ: the
        autoencoder is made of convolutions.
    """
    if config.channels != trained.channels:
        raise ConfigError(
            "model.image.channels",
            f"{config.channels}, but the autoencoder of {config.decoder.vae!r} was trained on "
            f"images of {trained.channels} channels; use another run or the same images.",
        )
    for field in dataclasses.fields(trained.model):
        ours, theirs = (
            getattr(model, field.name) for model in (config.decoder.vae_model, trained.model)
        )
        if ours != theirs:
            raise ConfigError(
                f"model.image.decoder.vae_model.{field.name}",
                f"{ours!r}, but the autoencoder of {config.decoder.vae!r} has {theirs!r}; set it "
                "to that.",
            )


def insert_image_vae(params: Any, vae_params: Any) -> Any:
    """The parameters of a model with `model.image.decoder.vae`, its autoencoder replaced.

    Args:
      params: of a `MegaTransformer`; not changed.
      vae_params: of an `ImageVae` that `check_image_vae` accepts.

    Raises:
      ValueError: if the autoencoder's parameters have other names or shapes.
    """

    def replaced(tree: Any, path: tuple[str, ...]) -> Any:
        if path:
            return {**tree, path[0]: replaced(tree[path[0]], path[1:])}
        wanted, given = (jax.tree.map(lambda leaf: leaf.shape, t) for t in (tree, vae_params))
        if wanted != given:
            raise ValueError(
                "the autoencoder's parameters do not fit the model's, which has other names or "
                "shapes; check_image_vae says which option differs."
            )
        return vae_params

    return replaced(params, _PATH)
