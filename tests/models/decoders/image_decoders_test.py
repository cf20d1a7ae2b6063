"""Decoders of images: the contract of all decoders, and what concerns images alone."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoder_contract import (
    CHECKS,
    DecoderCase,
    check_gradients_reach_all_parameters,
    first,
    random_condition,
)
from flax import linen as nn

from megatransformer_jax.config.diffusion import SamplerConfig
from megatransformer_jax.config.dit import DitConfig
from megatransformer_jax.config.flow import FlowSamplerConfig
from megatransformer_jax.config.image import ImageConfig
from megatransformer_jax.config.image_decoder import ImageDecoderConfig
from megatransformer_jax.config.image_vae import ImageVaeConfig
from megatransformer_jax.config.unet import UNetConfig
from megatransformer_jax.models.decoders.build import build_image_decoder
from megatransformer_jax.models.decoders.decoder import MediaDecoder
from megatransformer_jax.sharding.rules import Sharder
from megatransformer_jax.types import DTypePolicy

CONTEXT_WIDTH = 6
DECODERS = {
    "unet": ImageDecoderConfig(
        condition_dropout_rate=0.0,
        unet=UNetConfig(base_width=4, attention_levels=(1,), head_width=2, norm_groups=2),
        sampler=SamplerConfig(num_steps=2),
    ),
    "dit": ImageDecoderConfig(
        kind="dit",
        condition_dropout_rate=0.0,
        dit=DitConfig(width=8, num_layers=1, num_heads=2, hidden_width=12),
        flow_sampler=FlowSamplerConfig(num_steps=2),
    ),
    "latent": ImageDecoderConfig(
        kind="dit",
        condition_dropout_rate=0.0,
        dit=DitConfig(width=8, num_layers=1, num_heads=2, hidden_width=12, patch_size=1),
        flow_sampler=FlowSamplerConfig(sampler="euler", num_steps=2),
        vae="runs/vae",
        vae_model=ImageVaeConfig(base_width=4, latent_channels=2, norm_groups=2),
    ),
}


class Owner(nn.Module):
    """A model that has a decoder among its parts."""

    config: ImageConfig

    def setup(self):
        self.image_decoder = build_image_decoder(
            self.config, CONTEXT_WIDTH, DTypePolicy(), Sharder(), "cpu"
        )

    def loss(self, *arguments):
        assert isinstance(self.image_decoder, MediaDecoder)
        return self.image_decoder.loss(*arguments)

    def sample(self, *arguments):
        return self.image_decoder.sample(*arguments)


def config_of(name):
    return ImageConfig(height=4, width=8, channels=1, patch_size=2, decoder=DECODERS[name])


@pytest.fixture(scope="module", params=DECODERS)
def case(request):
    config = config_of(request.param)
    media = jax.random.uniform(jax.random.key(0), (3, *config.shape), minval=-1)
    return DecoderCase(Owner(config), media, None, CONTEXT_WIDTH, config.decoder.settings)


@pytest.mark.parametrize("check", CHECKS)
def test_contract(case, check):
    check(case)


def test_gradients_reach_all_parameters_but_the_autoencoders(case):
    decoder = case.variables["params"]["image_decoder"]
    is_latent = case.decoder.config.decoder.vae is not None
    assert sorted(decoder) == (["decoder", "image_vae"] if is_latent else ["network"])
    check_gradients_reach_all_parameters(case, without=("image_vae",))


def test_settings_and_guidance_replace_the_configs(case):
    settings = dataclasses.replace(case.settings, num_steps=1)
    if isinstance(settings, SamplerConfig):
        settings = dataclasses.replace(settings, threshold="none")
    inner = build_image_decoder(case.decoder.config, CONTEXT_WIDTH, DTypePolicy(), Sharder(), "cpu")
    params = {"params": case.variables["params"]["image_decoder"]}
    condition = first(case.condition, 2)

    @jax.jit
    def draw(scale, condition):
        arguments = condition, jax.random.key(3), None, settings, scale
        return inner.apply(params, *arguments, method="sample")[0]

    unsaid = condition.replace(is_context=jnp.zeros_like(condition.is_context))
    conditional, unconditional = draw(1.0, condition), draw(0.0, condition)
    np.testing.assert_allclose(unconditional, draw(1.0, unsaid), atol=1e-5)
    assert np.max(np.abs(conditional - unconditional)) > 1e-3
    assert np.max(np.abs(draw(3.0, condition) - conditional)) > 1e-3
    by_config, _ = case.sample(case.condition, jax.random.key(3))
    assert np.max(np.abs(conditional - by_config[:2])) > 1e-3


@pytest.mark.parametrize("name", DECODERS)
def test_images_of_another_shape_and_lengths_are_errors(name):
    module = Owner(config_of(name))
    condition = random_condition(1, CONTEXT_WIDTH)
    with pytest.raises(ValueError, match=r"images have shape \(8, 8, 1\) .* draws \(4, 8, 1\)"):
        module.init(
            jax.random.key(0),
            jnp.zeros((1, 8, 8, 1)),
            None,
            condition,
            jax.random.key(0),
            method="loss",
        )
    with pytest.raises(ValueError, match=r"lengths of shape .* were given for images"):
        module.init(
            jax.random.key(0),
            jnp.zeros((1, 4, 8, 1)),
            jnp.ones(1, jnp.int32),
            condition,
            jax.random.key(0),
            method="loss",
        )
