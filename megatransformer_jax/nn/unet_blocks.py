"""What a UNet is made of: residual convolutions, attention over pixels, changes of resolution."""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float

from megatransformer_jax.nn.cross_attention import CrossAttention
from megatransformer_jax.nn.dense import ZEROS, Convolution, Dense
from megatransformer_jax.nn.group_norm import GroupNorm
from megatransformer_jax.ops.attention_xla import attention_xla
from megatransformer_jax.ops.masks import AttentionMask
from megatransformer_jax.types import DTypePolicy


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
