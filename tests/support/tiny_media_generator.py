"""A tiny model of text, images and sound, and generators with it."""

import dataclasses
import functools

import numpy as np
from tiny_model import DEPTH, TINY, Pieces, make

from megatransformer_jax.config.audio import AudioConfig, AudioDecoderConfig, MelConfig
from megatransformer_jax.config.decoders import SamplerConfig, UNetConfig
from megatransformer_jax.config.generation import GenerationConfig, MediaGenerationConfig
from megatransformer_jax.config.image import ImageConfig, ImageDecoderConfig
from megatransformer_jax.data.media.records import AudioPart, ImagePart
from megatransformer_jax.data.media_tokenizer import MediaTokenizer
from megatransformer_jax.generation.generator import Generator

TOKENIZER = MediaTokenizer(Pieces())
UNET = UNetConfig(
    base_width=8, width_multipliers=(1,), attention_levels=(), head_width=8, norm_groups=4
)
MEL = MelConfig(
    sample_rate_hz=8000, num_mels=6, fft_samples=128, window_samples=128, hop_samples=64
)
SAMPLER = SamplerConfig(num_steps=2)
CONFIG = dataclasses.replace(
    TINY,
    vocab_size=TOKENIZER.vocab_size,
    recurrence=dataclasses.replace(TINY.recurrence, state_init="normal"),
    image=ImageConfig(
        enabled=True,
        height=4,
        width=4,
        channels=1,
        patch_size=2,
        prelude_layers=0,
        coda_layers=0,
        context_length=5,
        decoder=ImageDecoderConfig(unet=UNET, sampler=SAMPLER),
    ),
    audio=AudioConfig(
        enabled=True,
        mel=MEL,
        max_frames=8,
        downsampling=4,
        prelude_layers=0,
        coda_layers=0,
        context_length=5,
        decoder=AudioDecoderConfig(width=8, head_width=8, dilations=(1,), sampler=SAMPLER),
    ),
)
RNG = np.random.default_rng(0)
IMAGE_PART = ImagePart(RNG.uniform(-1, 1, (4, 4, 1)).astype(np.float32))
# Five frames, so two places.
CLIP_PART = AudioPart(RNG.uniform(-0.5, 0.5, 5 * 64).astype(np.float32), 8000)


def generator(media=None, **options) -> Generator:
    """With the tiny model, whose tokens are about equally likely."""
    model, params = parts()
    options = {"max_new_tokens": 12, **options}
    config = GenerationConfig(media=MediaGenerationConfig(**(media or {})), **options)
    return Generator(model, params, TOKENIZER, config, DEPTH)


@functools.cache
def parts():
    """(model, parameters)."""
    return make(CONFIG)
