"""The network that denoises mel spectrograms of different lengths."""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from megatransformer_jax.config.audio import AudioDecoderConfig
from megatransformer_jax.nn.attention import CrossAttention
from megatransformer_jax.nn.block import rematerialized
from megatransformer_jax.nn.conv import ZEROS, Dense, MaskedConvolution, frame_mask
from megatransformer_jax.nn.norms import layer_normalize
from megatransformer_jax.nn.parameters import vector
from megatransformer_jax.nn.time_embedding import ConditionEmbedding
from megatransformer_jax.ops.attention_xla import attention_xla
from megatransformer_jax.ops.masks import AttentionMask
from megatransformer_jax.ops.positions import RotaryTable, apply_rotary, rotary_table
from megatransformer_jax.types import DTypePolicy

EPS = 1e-6
ROTARY_BASE = 10_000.0
# Waves over a clip, and over a condition, that say how far along a place is.
NUM_WAVES = 8
# Width of the vector of time and condition, over that of the network.
EMBEDDING_FACTOR = 2


def progress_waves(is_there: Bool[Array, "N P"]) -> Float[Array, "N P waves"]:
    """How far along each place is among those that there are, as cosines and sines.

    The first place is at 0 and the last at 1; a wave of frequency k turns by pi k in between.
    """
    place = jnp.cumsum(is_there, axis=1) - 1
    last = jnp.maximum(jnp.sum(is_there, axis=1, keepdims=True) - 1, 1)
    angle = jnp.pi * (place / last)[..., None] * jnp.arange(1, NUM_WAVES + 1)
    return jnp.concatenate((jnp.cos(angle), jnp.sin(angle)), axis=-1)


class ScaledNorm(nn.Module):
    """Layer norm of each frame, then scale and shift by a vector of the time and the condition."""

    policy: DTypePolicy

    @nn.compact
    def __call__(
        self, x: Float[Array, "N F D"], embedding: Float[Array, "N D2"]
    ) -> Float[Array, "N F D"]:
        """norm(x) * (1 + scale) + shift."""
        width = x.shape[-1]
        weight = vector(self, "scale", nn.initializers.ones, (width,))
        both = Dense(2 * width, self.policy, name="modulation")(jax.nn.silu(embedding))
        scale, shift = jnp.split(both[:, None].astype(x.dtype), 2, axis=-1)
        return layer_normalize(x, weight, None, EPS) * (1 + scale) + shift


class FrameAttention(nn.Module):
    """Self-attention among the frames of a clip, with rotary positions; its output starts at 0."""

    head_width: int
    policy: DTypePolicy

    @nn.compact
    def __call__(
        self, x: Float[Array, "N F D"], is_frame: Bool[Array, "N F"], rotary: RotaryTable
    ) -> Float[Array, "N F D"]:
        """Attends; padding is neither seen nor sees."""
        count, frames, width = x.shape
        h = Dense(3 * width, self.policy, bias=False, name="query_key_value")(x)
        query, key, value = jnp.split(h.reshape(count, frames, -1, self.head_width), 3, axis=2)
        query, key = (apply_rotary(array, rotary, "half") for array in (query, key))
        segments = is_frame.astype(jnp.int32)
        mask = AttentionMask(is_causal=False, query_segment_ids=segments, key_segment_ids=segments)
        h = attention_xla(query, key, value, mask).reshape(count, frames, width)
        return Dense(width, self.policy, kernel_init=ZEROS, name="output")(h)


class MelBlock(nn.Module):
    """Dilated convolutions, self-attention and cross-attention to the condition, each residual and
    starting at zero."""

    config: AudioDecoderConfig
    dilation: int
    policy: DTypePolicy

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "N F D"],
        embedding: Float[Array, "N D2"],
        context: Float[Array, "N C D"],
        is_context: Bool[Array, "N C"],
        is_frame: Bool[Array, "N F"],
        rotary: RotaryTable,
    ) -> Float[Array, "N F D"]:
        """Transforms the frames; what comes out beyond a clip is for others to ignore."""
        width, head_width, policy = self.config.width, self.config.head_width, self.policy
        h = ScaledNorm(policy, name="conv_norm")(x, embedding)
        for name, init in (("conv_in", nn.initializers.lecun_normal()), ("conv_out", ZEROS)):
            h = MaskedConvolution(
                width, policy, dilation=self.dilation, kernel_init=init, name=name
            )(h, is_frame)
            h = jax.nn.silu(h) if name == "conv_in" else h
        x = x + h
        h = ScaledNorm(policy, name="attention_norm")(x, embedding)
        x = x + FrameAttention(head_width, policy, name="attention")(h, is_frame, rotary)
        h = ScaledNorm(policy, name="cross_norm")(x, embedding)
        return x + CrossAttention(head_width, policy, name="cross")(h, context, is_context)


class MelDenoiser(nn.Module):
    """From noisy mels, their lengths, the time and a condition to a prediction of the mels' shape.

    Bins are channels. Each frame is told how far along the clip it is, and each vector of the
    condition how far along that is, by the same waves: so cross-attention can learn to read the
    text from its start to its end while the sound goes on. `remat` as in `ModelConfig.remat`,
    applied to each block.
    """

    config: AudioDecoderConfig
    policy: DTypePolicy
    remat: str = "none"

    @nn.compact
    def __call__(
        self,
        mels: Float[Array, "N F M"],
        lengths: Int[Array, "N"],
        time: Float[Array, "N"],
        context: Float[Array, "N C D"],
        is_context: Bool[Array, "N C"],
    ) -> Float[Array, "N F M"]:
        """Predicts, float32; zeros beyond the lengths, and nothing there is seen.

        Args:
          mels: noisy normalised mels.
          lengths: frames of each.
          time: in [0, 1].
          context: vectors that say what to make.
          is_context: which of them there are.
        """
        width, policy = self.config.width, self.policy
        is_frame = frame_mask(lengths, mels.shape[1])
        embed = ConditionEmbedding(EMBEDDING_FACTOR * width, policy, name="condition")
        embedding, context = embed(time, context, is_context)
        context = Dense(width, policy, name="context")(context)
        context = context + Dense(width, policy, name="context_progress")(
            progress_waves(is_context)
        )
        x = MaskedConvolution(width, policy, name="conv_in")(mels, is_frame)
        x = x + Dense(width, policy, name="frame_progress")(progress_waves(is_frame))
        # How fast to speak.
        size = jnp.log1p(lengths.astype(jnp.float32))[:, None]
        embedding = embedding + Dense(embedding.shape[-1], policy, name="length")(size)
        frames = jnp.broadcast_to(jnp.arange(mels.shape[1]), mels.shape[:2])
        rotary = rotary_table(frames, self.config.head_width, ROTARY_BASE)
        block_class = rematerialized(MelBlock, self.remat)
        for index, dilation in enumerate(self.config.dilations):
            block = block_class(self.config, dilation, policy, name=f"block_{index}")
            x = block(x, embedding, context, is_context, is_frame, rotary)
        x = ScaledNorm(policy, name="norm_out")(x, embedding)
        output = MaskedConvolution(mels.shape[-1], policy, kernel_init=ZEROS, name="conv_out")
        predicted = output(jax.nn.silu(x), is_frame).astype(jnp.float32)
        return jnp.where(is_frame[..., None], predicted, 0.0)
