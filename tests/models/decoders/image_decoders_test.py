"""Decoders of images: the contract of all decoders, and what concerns images alone."""

import jax
import pytest
from decoder_contract import CHECKS, DecoderCase, check_gradients_reach_all_parameters

from megatransformer_jax.config.diffusion import SamplerConfig
from megatransformer_jax.config.image import ImageConfig
from megatransformer_jax.config.image_decoder import ImageDecoderConfig
from megatransformer_jax.config.unet import UNetConfig
from megatransformer_jax.models.decoders.build import build_image_decoder
from megatransformer_jax.sharding.rules import Sharder
from megatransformer_jax.types import DTypePolicy

CONTEXT_WIDTH = 6
UNET = UNetConfig(base_width=4, width_multipliers=(1, 2), head_width=2, norm_groups=2)


def case_of(kind):
    decoder = ImageDecoderConfig(kind="unet", condition_dropout_rate=0.0, unet=UNET)
    settings = SamplerConfig(num_steps=2, threshold="none")
    config = ImageConfig(height=4, width=8, channels=1, patch_size=2, decoder=decoder)
    module = build_image_decoder(config, CONTEXT_WIDTH, DTypePolicy(), Sharder(), "cpu")
    media = jax.random.uniform(jax.random.key(0), (3, *config.shape), minval=-1)
    return DecoderCase(module, media, None, CONTEXT_WIDTH, settings)


@pytest.fixture(scope="module", params=["unet"])
def case(request):
    return case_of(request.param)


@pytest.mark.parametrize("check", CHECKS)
def test_contract(case, check):
    check(case)


def test_gradients_reach_all_parameters(case):
    check_gradients_reach_all_parameters(case)
