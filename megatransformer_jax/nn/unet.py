"""A UNet (arXiv 1505.04597) that denoises images, as in arXiv 2105.05233."""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float

from megatransformer_jax.config.decoders import UNetConfig
from megatransformer_jax.nn.dense import ZEROS, Convolution
from megatransformer_jax.nn.group_norm import GroupNorm
from megatransformer_jax.nn.time_embedding import ConditionEmbedding
from megatransformer_jax.nn.unet_blocks import Downsample, PixelAttention, ResidualBlock, Upsample
from megatransformer_jax.types import DTypePolicy

# Width of the vector of time and condition, over base_width.
EMBEDDING_FACTOR = 4


class UNet(nn.Module):
    """From a noisy image, the time and a condition to a prediction of the image's shape.

    Down: per level `blocks_per_level` residual blocks, the output of each kept as a skip, then half
    the sides. Middle: block, attention, block. Up: the same with one block more, each of which gets
    a skip beside what comes from below. Attention follows the blocks of the configured levels.
    """

    config: UNetConfig
    policy: DTypePolicy

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

        def block(x: jax.Array, channels: int, name: str) -> jax.Array:
            return ResidualBlock(channels, config.norm_groups, policy, name=name)(x, embedding)

        def attend(x: jax.Array, name: str) -> jax.Array:
            module = PixelAttention(config.head_width, config.norm_groups, policy, name=name)
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
