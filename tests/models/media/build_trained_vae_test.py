"""A trained autoencoder in a model: the same architecture, and its weights in their place."""

import dataclasses

import numpy as np
import pytest

from megatransformer_jax.config.decoders import FlowSamplerConfig
from megatransformer_jax.config.image import (
    ImageConfig,
    ImageDecoderConfig,
    ImageVaeConfig,
    ImageVaeRunConfig,
)
from megatransformer_jax.config.option import ConfigError
from megatransformer_jax.models.media.build import check_image_vae, insert_image_vae

VAE = ImageVaeConfig(base_width=16)
CONFIG = ImageConfig(
    channels=1,
    decoder=ImageDecoderConfig(
        kind="dit", vae="runs/vae", vae_model=VAE, flow_sampler=FlowSamplerConfig(num_steps=3)
    ),
)


def test_the_architecture_must_be_that_of_the_run():
    check_image_vae(CONFIG, ImageVaeRunConfig(height=64, channels=1, model=VAE))
    with pytest.raises(ConfigError, match=r"1, but the autoencoder of 'runs/vae' .* 3 channels"):
        check_image_vae(CONFIG, ImageVaeRunConfig(model=VAE))
    other = dataclasses.replace(VAE, latent_channels=8)
    with pytest.raises(ConfigError, match=r"vae_model.latent_channels: 4, but .* has 8"):
        check_image_vae(CONFIG, ImageVaeRunConfig(channels=1, model=other))


def test_only_the_autoencoder_is_replaced():
    decoder = {"decoder": {"w": np.zeros(2)}, "image_vae": {"v": {"kernel": np.zeros((2, 3))}}}
    params = {"embedding": np.zeros(1), "media": {"image_decoder": decoder, "x": np.zeros(1)}}
    trained = {"v": {"kernel": np.ones((2, 3))}}
    after = insert_image_vae(params, trained)
    assert after["media"]["image_decoder"]["image_vae"] is trained
    assert after["media"]["image_decoder"]["decoder"] is decoder["decoder"]
    assert after["media"]["x"] is params["media"]["x"]
    assert after["embedding"] is params["embedding"]
    assert decoder["image_vae"]["v"]["kernel"].sum() == 0
    for wrong in ({"v": {"kernel": np.ones((3, 3))}}, {"v": {"bias": np.ones((2, 3))}}):
        with pytest.raises(ValueError, match="parameters do not fit the model's"):
            insert_image_vae(params, wrong)
