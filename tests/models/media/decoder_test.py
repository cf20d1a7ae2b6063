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
    check_remat_keeps_less_and_changes_nothing,
    random_condition,
)
from flax import linen as nn

from megatransformer_jax.config.decoders import (
    DiffusionConfig,
    DitConfig,
    FlowConfig,
    FlowSamplerConfig,
    SamplerConfig,
    UNetConfig,
)
from megatransformer_jax.config.image import ImageConfig, ImageDecoderConfig, ImageVaeConfig
from megatransformer_jax.models.media.build import build_image_decoder
from megatransformer_jax.models.media.decoder import MediaDecoder
from megatransformer_jax.models.media.diffusion import DiffusionDecoder
from megatransformer_jax.models.media.flow import FlowDecoder
from megatransformer_jax.sharding.rules import Sharder
from megatransformer_jax.types import DTypePolicy

CONTEXT_WIDTH = 6
DECODERS = {
    "unet": ImageDecoderConfig(
        condition_dropout_rate=0.0,
        unet=UNetConfig(base_width=4, attention_levels=(), head_width=2, norm_groups=2),
        sampler=SamplerConfig(num_steps=2, threshold="none"),
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
    remat: str = "none"

    def setup(self):
        self.image_decoder = build_image_decoder(
            self.config, DTypePolicy(), Sharder(), "cpu", self.remat
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


def test_images_are_in_their_range(case):
    made, _ = case.sample(case.condition, jax.random.key(3))
    assert np.max(np.abs(made)) <= 1.0
    assert np.max(np.abs(made)) > 0.0


@pytest.mark.parametrize("check", CHECKS)
def test_contract(case, check):
    check(case)


def test_gradients_reach_all_parameters_but_the_autoencoders(case):
    decoder = case.variables["params"]["image_decoder"]
    is_latent = case.decoder.config.decoder.vae is not None
    assert sorted(decoder) == (["decoder", "image_vae"] if is_latent else ["network"])
    check_gradients_reach_all_parameters(case, without=("image_vae",))


def test_remat_keeps_less_and_changes_nothing(case):
    check_remat_keeps_less_and_changes_nothing(case, Owner(case.decoder.config, "full"))


class TinyNetwork(nn.Module):
    """Adds what the condition says to the noisy medium."""

    @nn.compact
    def __call__(self, noisy, time, context, is_context):
        weight = self.param("weight", nn.initializers.ones, ())
        said = jnp.sum(jnp.where(is_context[..., None], context, 0.0), axis=(1, 2))
        return weight * (noisy + said[:, None, None, None])


@pytest.mark.parametrize("kind", ["diffusion", "flow"])
def test_settings_and_guidance_replace_the_configs(kind):
    if kind == "diffusion":
        settings = SamplerConfig(num_steps=3, threshold="none")
        decoder = DiffusionDecoder(
            TinyNetwork(), (2, 2, 1), 0.0, False, DiffusionConfig(), settings
        )
    else:
        settings = FlowSamplerConfig(num_steps=3)
        decoder = FlowDecoder(TinyNetwork(), (2, 2, 1), 0.0, False, FlowConfig(), settings)
    params, condition = {"params": {"network": {"weight": 0.5}}}, random_condition(2, 2)
    key = jax.random.key(3)

    @jax.jit
    def draw_all(scale):
        def draw(*arguments):
            return decoder.apply(params, *arguments, method="sample")[0]

        nothing = condition.replace(is_context=jnp.zeros_like(condition.is_context))
        by_two = dataclasses.replace(settings, guidance_scale=2.0)
        return {
            "config": draw(condition, key),
            "one step": draw(condition, key, None, dataclasses.replace(settings, num_steps=1)),
            "nothing said": draw(nothing, key),
            "scaled": draw(condition, key, None, None, scale),
            "by two": draw(condition, key, None, by_two),
            "scaled above settings": draw(condition, key, None, by_two, scale),
        }

    at_0, at_1, at_2 = (draw_all(scale) for scale in (0.0, 1.0, 2.0))
    assert draw_all._cache_size() == 1
    np.testing.assert_allclose(at_0["scaled"], at_0["nothing said"], atol=1e-5)
    np.testing.assert_allclose(at_1["scaled"], at_1["config"], atol=1e-5)
    np.testing.assert_allclose(at_2["scaled"], at_2["by two"], atol=1e-5)
    np.testing.assert_allclose(at_1["scaled above settings"], at_1["config"], atol=1e-5)
    for name in ("one step", "nothing said", "by two"):
        assert np.max(np.abs(at_1[name] - at_1["config"])) > 1e-2, name


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
