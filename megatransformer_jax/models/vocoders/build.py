"""Builds a vocoder, and the discriminators it may be trained against, from its config."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Key

from megatransformer_jax.config.vocoder import VOCODERS, VocoderConfig
from megatransformer_jax.models.discriminators.ensemble import Discriminators
from megatransformer_jax.models.vocoders.hifigan import HifiganGenerator
from megatransformer_jax.models.vocoders.istft import IstftGenerator
from megatransformer_jax.nn.parameters import axes_of
from megatransformer_jax.types import DTypePolicy

GENERATOR, DISCRIMINATOR = "generator", "discriminator"


def build_generator(config: VocoderConfig, policy: DTypePolicy) -> nn.Module:
    """From (mels [N, F, M], lengths [N]) to waveforms [N, F * hop_samples].

    Raises:
      ValueError: if the kind is unknown.
    """
    match config.kind:
        case "istft":
            return IstftGenerator(config, policy)
        case "hifigan":
            return HifiganGenerator(config, policy)
    raise ValueError(f"unknown vocoder {config.kind!r}; known: {', '.join(VOCODERS)}")


def build_discriminators(config: VocoderConfig, policy: DTypePolicy) -> Discriminators | None:
    """What the generator is trained against, or None."""
    options = config.discriminator
    return Discriminators(options, policy) if options.enabled else None


def init_vocoder(config: VocoderConfig, policy: DTypePolicy, key: Key[Array, ""]) -> Any:
    """Fresh parameters: {'generator': ..., and with discriminators 'discriminator': ...}."""
    return nn.meta.unbox(_init_boxed(config, policy, key))


def vocoder_axes(config: VocoderConfig, policy: DTypePolicy) -> Any:
    """Logical axis names of every parameter, in the tree of `init_vocoder`."""
    return axes_of(jax.eval_shape(lambda key: _init_boxed(config, policy, key), jax.random.key(0)))


def _init_boxed(config: VocoderConfig, policy: DTypePolicy, key: Key[Array, ""]) -> Any:
    frames = config.segment_frames
    generator_key, discriminator_key = jax.random.split(key)
    mels = jnp.zeros((1, frames, config.mel.num_mels))
    lengths = jnp.full(1, frames)
    generator = build_generator(config, policy)
    params = {GENERATOR: generator.init(generator_key, mels, lengths)["params"]}
    discriminators = build_discriminators(config, policy)
    if discriminators is not None:
        waveform = jnp.zeros((1, frames * config.mel.hop_samples))
        params[DISCRIMINATOR] = discriminators.init(discriminator_key, waveform)["params"]
    return params
