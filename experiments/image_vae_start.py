"""Start of a run that draws latents of a trained autoencoder (`model.image.decoder.vae`)."""

from typing import Any

import jax
import optax
from absl import logging

from experiments.load_image_vae import load_image_vae
from megatransformer_jax.config.run import RunConfig
from megatransformer_jax.models.media.build import check_image_vae, insert_image_vae
from megatransformer_jax.models.megatransformer import MegaTransformer
from megatransformer_jax.training.state import TrainState, init_state


def latent_state(
    config: RunConfig,
    model: MegaTransformer,
    optimizer: optax.GradientTransformation,
    shardings: TrainState,
) -> TrainState:
    """A state at step 0 with the autoencoder's weights, which training leaves as they are.

    Args:
      config: of the run.
      model: with `model.image.decoder.vae`.
      optimizer: of the run.
      shardings: of the state.

    Raises:
      UserError: if there is no such autoencoder.
      ConfigError: if it is not the one that the model describes.
    """
    path = config.model.image.decoder.vae
    assert path is not None  # The caller has looked.
    trained, vae_params = load_image_vae(path)
    check_image_vae(config.model.image, trained)

    def initialise(key: jax.Array, vae_params: Any) -> TrainState:
        def adjust(params: Any) -> Any:
            return insert_image_vae(params, vae_params)

        return init_state(model, optimizer, key, adjust, fine_tuning=config.fine_tuning)

    key = jax.random.key(config.train.seed)
    state = jax.jit(initialise, out_shardings=shardings)(key, vae_params)
    logging.info("images are drawn as latents of the autoencoder in %s", path)
    return state
