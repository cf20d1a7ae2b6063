"""A tiny model of text, images and sound, and batches for it, for tests of several folders."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from megatransformer_jax.config.audio import AudioConfig, AudioDecoderConfig, MelConfig
from megatransformer_jax.config.data import DataConfig, TokenizerConfig
from megatransformer_jax.config.decoders import UNetConfig
from megatransformer_jax.config.image import ImageConfig, ImageDecoderConfig
from megatransformer_jax.config.layers import AttentionConfig
from megatransformer_jax.config.media_data import MediaDataConfig
from megatransformer_jax.config.model import MlpConfig, ModelConfig
from megatransformer_jax.config.recurrence import RecurrenceConfig
from megatransformer_jax.config.run import RunConfig
from megatransformer_jax.models.megatransformer import MegaTransformer, build_model
from megatransformer_jax.sharding.rules import Sharder
from megatransformer_jax.types import AUDIO, IMAGE, Batch, DTypePolicy, MediaBatch

VOCAB, LENGTH, SLOTS, MAX_FRAMES, MELS = 24, 8, 2, 8, 6
UNET = UNetConfig(
    base_width=8, width_multipliers=(1,), attention_levels=(), head_width=8, norm_groups=4
)
CONFIG = ModelConfig(
    vocab_size=VOCAB,
    width=16,
    max_length=32,
    core_layers=1,
    attention=AttentionConfig(num_heads=2),
    mlp=MlpConfig(hidden_width=20),
    recurrence=RecurrenceConfig(mean_steps=2, backprop_depth=2, state_init="zero"),
    image=ImageConfig(
        enabled=True,
        height=4,
        width=4,
        channels=1,
        patch_size=2,
        context_length=3,
        decoder=ImageDecoderConfig(unet=UNET),
    ),
    audio=AudioConfig(
        enabled=True,
        mel=MelConfig(num_mels=MELS),
        max_frames=MAX_FRAMES,
        downsampling=4,
        context_length=3,
        decoder=AudioDecoderConfig(width=8, head_width=8, dilations=(1,)),
    ),
)


def tiny_media_run(
    num_rows: int, config: ModelConfig = CONFIG, tasks: tuple[str, ...] = (), **changes: Any
) -> RunConfig:
    """A run whose batches may be those of `tiny_media_batch`; `changes` are further sections."""
    media = MediaDataConfig(
        tasks=("fewshot=1", "which_clip=1", *tasks), images_per_row=SLOTS, audio_per_row=SLOTS
    )
    data = DataConfig(
        source="media",
        batch_size=num_rows,
        sequence_length=LENGTH,
        tokenizer=TokenizerConfig(kind="bytes"),
        media=media,
    )
    # As many ids as its tokenizer has.
    return RunConfig(model=dataclasses.replace(config, vocab_size=270), data=data, **changes)


def tiny_media_model(config: ModelConfig = CONFIG) -> MegaTransformer:
    """The model, off any mesh."""
    return build_model(config, DTypePolicy(), Sharder(), "cpu")


def tiny_media_batch(num_rows: int = 2, seed: int = 0, config: ModelConfig = CONFIG) -> Batch:
    """Rows that take turns: image, text, clip; and clip, image, image; each padded at the end."""
    rng = np.random.default_rng(seed)
    turns = np.arange(num_rows) % 2
    follows = np.zeros((num_rows, LENGTH), np.int32)
    follows[turns == 0, 1], follows[turns == 0, 4] = IMAGE, AUDIO
    follows[turns == 1, 0], follows[turns == 1, 2], follows[turns == 1, 3] = AUDIO, IMAGE, IMAGE
    segments = np.ones((num_rows, LENGTH), np.int32)
    segments[turns == 0, 7:], segments[turns == 1, 6:] = 0, 0
    tokens = rng.integers(3, VOCAB, (num_rows, LENGTH)).astype(np.int32) * (segments > 0)
    has_image = np.stack([np.ones(num_rows, bool), turns == 1], axis=1)
    frames = np.stack([np.where(turns == 0, 5, MAX_FRAMES), np.zeros(num_rows, int)], axis=1)
    images = rng.uniform(-1, 1, (num_rows, SLOTS, *config.image.shape)).astype(np.float32)
    mels = rng.uniform(-1, 1, (num_rows, SLOTS, MAX_FRAMES, MELS)).astype(np.float32)
    is_frame = np.arange(MAX_FRAMES) < frames[..., None]
    has_images, has_audio = config.image.enabled, config.audio.enabled
    media = MediaBatch(
        follows,
        images=images * has_image[..., None, None, None] if has_images else None,
        is_image=has_image if has_images else None,
        is_drawn=has_image if has_images else None,
        mels=mels * is_frame[..., None] if has_audio else None,
        mel_lengths=frames.astype(np.int32) if has_audio else None,
        is_spoken=frames > 0 if has_audio else None,
    )
    mask = ((segments > 0) & (follows == 0)).astype(np.float32)
    positions = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), tokens.shape)
    batch = Batch(tokens, np.roll(tokens, -1, 1), mask, segments, positions, media)
    return jax.tree.map(jnp.asarray, batch)
