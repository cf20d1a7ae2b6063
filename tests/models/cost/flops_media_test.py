"""FLOPs of images and sound: hand counts of encoders, and one network call per step."""

import dataclasses

import pytest

from megatransformer_jax.config.audio import AudioConfig, AudioDecoderConfig, MelConfig
from megatransformer_jax.config.decoders import DitConfig, FlowSamplerConfig, SamplerConfig
from megatransformer_jax.config.image import ImageConfig, ImageDecoderConfig
from megatransformer_jax.config.layers import AttentionConfig
from megatransformer_jax.config.model import MlpConfig, ModelConfig
from megatransformer_jax.models.cost.flops import media_flops
from megatransformer_jax.models.megatransformer import build_model
from megatransformer_jax.sharding.rules import Sharder
from megatransformer_jax.types import DTypePolicy

WIDTH, HIDDEN = 16, 24
DIT = ImageDecoderConfig(
    kind="dit",
    dit=DitConfig(width=8, num_layers=1, num_heads=2, hidden_width=8),
    flow_sampler=FlowSamplerConfig(sampler="heun", num_steps=3),
)
MODEL = ModelConfig(
    vocab_size=32,
    width=WIDTH,
    attention=AttentionConfig(num_heads=2),
    mlp=MlpConfig(hidden_width=HIDDEN),
    image=ImageConfig(
        enabled=True,
        height=8,
        width=8,
        channels=1,
        patch_size=2,
        prelude_layers=1,
        coda_layers=0,
        decoder=DIT,
    ),
    audio=AudioConfig(
        enabled=True,
        mel=MelConfig(num_mels=8),
        max_frames=16,
        downsampling=4,
        prelude_layers=0,
        coda_layers=1,
        context_length=5,
        decoder=AudioDecoderConfig(
            width=8,
            head_width=4,
            dilations=(1,),
            sampler=SamplerConfig(num_steps=4, guidance_scale=2.0),
        ),
    ),
)


def layer(places: int) -> int:
    """One layer that sees all of its places."""
    weights = 4 * WIDTH * WIDTH + 3 * WIDTH * HIDDEN
    return 2 * places * (weights + 2 * places * WIDTH)


def count(config: ModelConfig) -> dict:
    return media_flops(build_model(config, DTypePolicy(), Sharder(), "cpu"))


def test_encoders_codas_and_steps_are_counted() -> None:
    counts = count(MODEL)
    image, audio = counts["image"], counts["audio"]
    assert (image.places, audio.places) == (16, 4)
    assert image.prelude == 2 * 16 * 4 * WIDTH + layer(16)
    assert image.coda == 0
    # Convolutions of 3 taps to 16, 8 and 4 places, then a linear map of these.
    convolutions = 2 * 3 * (16 * 8 * WIDTH + 8 * WIDTH * WIDTH + 4 * WIDTH * WIDTH)
    assert audio.prelude == convolutions + 2 * 4 * WIDTH * WIDTH
    assert audio.coda == layer(5)
    # Heun's last step needs one call of the network, the others two.
    calls = image.sampling / image.decoder
    assert image.sampling_steps == 3 and calls == pytest.approx(6, abs=1)
    # Guidance calls the network twice; training has the length's head besides.
    assert audio.sampling_steps == 4
    assert audio.sampling / audio.decoder == pytest.approx(8, rel=0.05)
    assert image.forward == image.prelude + image.coda + image.decoder


def test_a_model_has_what_it_enables() -> None:
    silent = dataclasses.replace(MODEL, audio=AudioConfig())
    assert list(count(silent)) == ["image"]
