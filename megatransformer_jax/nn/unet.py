"""A UNet (arXiv 1505.04597) that denoises images, as in arXiv 2105.05233.

First its parts: residual convolutions, attention over pixels, changes of resolution.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float

from megatransformer_jax.config.decoders import UNetConfig
from megatransformer_jax.nn.attention import CrossAttention
from megatransformer_jax.nn.block import rematerialized
from megatransformer_jax.nn.conv import ZEROS, Convolution, Dense
from megatransformer_jax.nn.norms import GroupNorm
from megatransformer_jax.nn.time_embedding import ConditionEmbedding
from megatransformer_jax.ops.attention_xla import attention_xla
from megatransformer_jax.ops.masks import AttentionMask
from megatransformer_jax.types import DTypePolicy

# ------------------------------------------------------------------------------
# The network.

# Width of the vector of time and condition, over base_width.
EMBEDDING_FACTOR = 4


class UNet(nn.Module):
    """From a noisy image, the time and a condition to a prediction of the image's shape.

    Down: per level `blocks_per_level` residual blocks, the output of each kept as a skip, then half
    the sides. Middle: block, attention, block. Up: the same with one block more, each of which gets
    a skip next to what comes from below. Attention follows the blocks of the configured levels.
    `remat` as in `ModelConfig.remat`, applied to each block and each attention.
    """

    config: UNetConfig
    policy: DTypePolicy
    remat: str = "none"

    @nn.compact
    def __call__(
        self,
        images: Float[Array, "N height width C"],
        time: Float[Array, "N"],
        context: Float[Array, "N K D"],
        is_context: Bool[Array, "N K"],
    ) -> Float[Array, "N height width C"]:
        """Predicts, float32.

        Args:
          images: noisy images; sides divisible by `config.shrinkage`.
          time: in [0, 1].
          context: vectors that say what to draw.
          is_context: which of them there are.

        Raises:
          ValueError: if the sides cannot be halved as often as the config says.
        """
        config, policy = self.config, self.policy
        self._check(images)
        embed = ConditionEmbedding(EMBEDDING_FACTOR * config.base_width, policy, name="condition")
        embedding, context = embed(time, context, is_context)

        block_class = rematerialized(ResidualBlock, self.remat)
        attention_class = rematerialized(PixelAttention, self.remat)

        def block(x: jax.Array, channels: int, name: str) -> jax.Array:
            return block_class(channels, config.norm_groups, policy, name=name)(x, embedding)

        def attend(x: jax.Array, name: str) -> jax.Array:
            module = attention_class(config.head_width, config.norm_groups, policy, name=name)
            return module(x, context, is_context)

        def layer(x: jax.Array, level: int, name: str) -> jax.Array:
            x = block(x, config.base_width * config.width_multipliers[level], f"{name}_block")
            return attend(x, f"{name}_attention") if level in config.attention_levels else x

        levels = range(len(config.width_multipliers))
        x = Convolution(config.base_width, policy, name="conv_in")(images)
        skips = [x]
        for level in levels:
            for index in range(config.blocks_per_level):
                x = layer(x, level, f"down_{level}_{index}")
                skips.append(x)
            if level != levels[-1]:
                x = Downsample(policy, name=f"down_{level}_half")(x)
                skips.append(x)
        x = block(x, x.shape[-1], "middle_block_0")
        x = block(attend(x, "middle_attention"), x.shape[-1], "middle_block_1")
        for level in reversed(levels):
            for index in range(config.blocks_per_level + 1):
                joined = jnp.concatenate((x, skips.pop()), axis=-1)
                x = layer(joined, level, f"up_{level}_{index}")
            if level != levels[0]:
                x = Upsample(policy, name=f"up_{level}_double")(x)
        x = jax.nn.silu(GroupNorm(config.norm_groups, name="norm_out")(x))
        x = Convolution(images.shape[-1], policy, kernel_init=ZEROS, name="conv_out")(x)
        return x.astype(jnp.float32)

    def _check(self, images: jax.Array) -> None:
        times = self.config.shrinkage
        if images.shape[1] % times or images.shape[2] % times:
            raise ValueError(
                f"images of {images.shape[1]}x{images.shape[2]} cannot be halved to the lowest of "
                f"{len(self.config.width_multipliers)} resolutions; sides must be multiples of "
                f"{times}, or width_multipliers shorter."
            )


# ------------------------------------------------------------------------------
# What a UNet is made of: residual convolutions, attention over pixels, changes of resolution.


class ResidualBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))); its second norm is scaled and shifted by a vector.

    The vector, of the time and the condition, acts in every block (arXiv 2105.05233). The second
    convolution starts at zero. Without a vector it is a plain block.
    """

    channels: int
    num_groups: int
    policy: DTypePolicy

    @nn.compact
    def __call__(
        self, x: Float[Array, "N height width C"], embedding: Float[Array, "N D"] | None = None
    ) -> Float[Array, "N height width C2"]:
        """Transforms `x` to `channels`."""
        h = jax.nn.silu(GroupNorm(self.num_groups, name="norm_in")(x))
        h = Convolution(self.channels, self.policy, name="conv_in")(h)
        scale = shift = None
        if embedding is not None:
            both = Dense(2 * self.channels, self.policy, name="modulation")(jax.nn.silu(embedding))
            scale, shift = jnp.split(both, 2, axis=-1)
        h = jax.nn.silu(GroupNorm(self.num_groups, name="norm_out")(h, scale, shift))
        h = Convolution(self.channels, self.policy, kernel_init=ZEROS, name="conv_out")(h)
        if x.shape[-1] != self.channels:
            x = Convolution(self.channels, self.policy, size=1, name="skip")(x)
        return x.astype(h.dtype) + h


class PixelAttention(nn.Module):
    """Self-attention over all pixels, then cross-attention to the condition, both residual."""

    head_width: int
    num_groups: int
    policy: DTypePolicy

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "N height width C"],
        context: Float[Array, "N K D"],
        is_context: Bool[Array, "N K"],
    ) -> Float[Array, "N height width C"]:
        """Attends; each output starts at zero."""
        count, _, _, channels = x.shape
        pixels = x.reshape(count, -1, channels)
        h = GroupNorm(self.num_groups, name="norm")(pixels)
        h = Dense(3 * channels, self.policy, bias=False, name="query_key_value")(h)
        query, key, value = jnp.split(h.reshape(count, h.shape[1], -1, self.head_width), 3, axis=2)
        # Fused kernels gain nothing over so few pixels, and no count of media suits all of them.
        h = attention_xla(query, key, value, AttentionMask(is_causal=False))
        h = h.reshape(count, -1, channels)
        pixels = pixels + Dense(channels, self.policy, kernel_init=ZEROS, name="output")(h)
        h = GroupNorm(self.num_groups, name="cross_norm")(pixels)
        attend = CrossAttention(self.head_width, self.policy, name="cross")
        return (pixels + attend(h, context, is_context)).reshape(x.shape)


class Downsample(nn.Module):
    """Half the sides, by a convolution of stride 2."""

    policy: DTypePolicy

    @nn.compact
    def __call__(self, x: Float[Array, "N height width C"]) -> Float[Array, "N height2 width2 C"]:
        """Halves both sides, which must be even."""
        return Convolution(x.shape[-1], self.policy, stride=2, name="conv")(x)


class Upsample(nn.Module):
    """Twice the sides: every pixel four times, then a convolution."""

    policy: DTypePolicy

    @nn.compact
    def __call__(self, x: Float[Array, "N height width C"]) -> Float[Array, "N height2 width2 C"]:
        """Doubles both sides."""
        count, height, width, channels = x.shape
        wide = jnp.broadcast_to(
            x[:, :, None, :, None], (count, height, 2, width, 2, channels)
        ).reshape(count, 2 * height, 2 * width, channels)
        return Convolution(channels, self.policy, name="conv")(wide)
