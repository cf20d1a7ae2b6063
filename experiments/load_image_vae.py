"""Reads the image autoencoder of a run, for decoders in latent space."""

from typing import Any

import jax

from experiments.load_medium_run import load_medium_run
from experiments.run_kinds.image_vae import ImageVaeModel
from megatransformer_jax.config.image import ImageVaeRunConfig
from megatransformer_jax.config.run import RunConfig
from megatransformer_jax.types import DTypePolicy


def load_image_vae(workdir: str, step: str | int = "latest") -> tuple[ImageVaeRunConfig, Any]:
    """The autoencoder of a run with kind='image_vae', and its parameters.

    Args:
      workdir: of the run; nothing in it is changed.
      step: latest, best, or the number of a checkpoint.

    Raises:
      UserError: if there is no such run or checkpoint, or it is of another kind.
    """

    def make_model(config: RunConfig) -> ImageVaeModel:
        policy = DTypePolicy.from_precision(config.train.precision, jax.default_backend())
        return ImageVaeModel(config.image_vae, policy)

    config, params = load_medium_run(workdir, "image_vae", make_model, step)
    return config.image_vae, params
