"""A diffusion transformer (DiT, arXiv 2212.09748) with cross-attention to its condition."""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float

from megatransformer_jax.config.decoders import DitConfig
from megatransformer_jax.config.layers import AttentionConfig, PositionConfig
from megatransformer_jax.config.model import MlpConfig, ModelConfig
from megatransformer_jax.nn.attention import CrossAttention, SelfAttention
from megatransformer_jax.nn.block import rematerialized
from megatransformer_jax.nn.context import LayerContext
from megatransformer_jax.nn.conv import ZEROS, Dense
from megatransformer_jax.nn.embedding import patchify, unpatchify
from megatransformer_jax.nn.mlp import Mlp
from megatransformer_jax.nn.norms import layer_normalize
from megatransformer_jax.nn.parameters import weight_init
from megatransformer_jax.nn.time_embedding import ConditionEmbedding
from megatransformer_jax.ops.masks import AttentionMask
from megatransformer_jax.ops.positions import sinusoidal_embedding
from megatransformer_jax.sharding.rules import Sharder
from megatransformer_jax.types import DTypePolicy

EPS = 1e-6


class Dit(nn.Module):
    """From a noisy image, the time and a condition to a prediction of the image's shape.

    Places are two sinusoids, of the row and of the column. The output starts at zero. `remat` as in
    `ModelConfig.remat`, applied to each layer.
    """

    config: DitConfig
    policy: DTypePolicy
    sharder: Sharder
    platform: str
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
          images: noisy images.
          time: in [0, 1].
          context: vectors that say what to draw.
          is_context: which of them there are.

        Raises:
          ValueError: if patches do not fill the image.
        """
        config, policy = self.config, self.policy
        embed = ConditionEmbedding(config.width, policy, name="condition")
        embedding, context = embed(time, context, is_context)
        embedding = jax.nn.silu(embedding)
        patches = patchify(images, config.patch_size)
        _, height, width, channels = images.shape
        rows, columns = height // config.patch_size, width // config.patch_size
        x = Dense(config.width, policy, name="patches_in")(patches)
        x = x + grid_embedding(rows, columns, config.width).astype(x.dtype)
        block_class = rematerialized(DitBlock, self.remat)
        for layer in range(config.num_layers):
            block = block_class(config, policy, self.sharder, self.platform, name=f"layer_{layer}")
            x = block(x, embedding, context, is_context)
        shift, scale = _modulation(embedding, 2, config.width, policy, "modulation_out")
        x = _modulated(x, shift, scale)
        x = Dense(patches.shape[-1], policy, kernel_init=ZEROS, name="patches_out")(x)
        return unpatchify(x.astype(jnp.float32), config.patch_size, (height, width, channels))


class DitBlock(nn.Module):
    """Self-attention, cross-attention, feed-forward; the first and last with adaLN-zero.

    x + gate f(norm(x) (1 + scale) + shift), the three of them from the embedding by a matrix that
    starts at zero, so that the block starts as the identity.
    """

    config: DitConfig
    policy: DTypePolicy
    sharder: Sharder
    platform: str

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "N P D"],
        embedding: Float[Array, "N D"],
        context: Float[Array, "N K D2"],
        is_context: Bool[Array, "N K"],
    ) -> Float[Array, "N P D"]:
        """Runs the layer."""
        layers = layer_config(self.config)
        width = self.config.width
        inits = weight_init(layers, width)
        parts = (self.policy, self.sharder, self.platform)
        modulation = _modulation(embedding, 6, width, self.policy, "modulation")
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = modulation
        attend = SelfAttention(layers, inits, *parts, name="attention")
        everything = LayerContext(AttentionMask(is_causal=False))
        x = x + gate[:, None] * attend(_modulated(x, shift, scale), everything)
        cross = CrossAttention(width // self.config.num_heads, self.policy, name="cross")
        x = x + cross(_normalized(x), context, is_context)
        feed_forward = Mlp(layers.mlp, inits, self.policy, name="mlp")
        return x + mlp_gate[:, None] * feed_forward(_modulated(x, mlp_shift, mlp_scale), True)


def layer_config(config: DitConfig) -> ModelConfig:
    """The text model's options that its attention and feed-forward layer read here."""
    return ModelConfig(
        width=config.width,
        prelude_layers=config.num_layers,
        core_layers=0,
        coda_layers=0,
        # Fused kernels gain nothing over so few patches, and no count of media suits all of them.
        attention=AttentionConfig(num_heads=config.num_heads, kernel="xla"),
        positions=PositionConfig(scheme="none"),
        mlp=MlpConfig(
            kind="mlp", hidden_width=config.hidden_width, activation="gelu_tanh", bias=True
        ),
    )


def grid_embedding(rows: int, columns: int, width: int) -> Float[Array, "1 P D"]:
    """Sinusoids of each place's row in the first half of the channels, of its column in the other.

    Raises ValueError if width is not a multiple of 4.
    """
    if width % 4:
        raise ValueError(f"width is {width}; two sinusoids of a place need a multiple of 4.")
    row, column = jnp.divmod(jnp.arange(rows * columns), columns)
    halves = [sinusoidal_embedding(places[None], width // 2) for places in (row, column)]
    return jnp.concatenate(halves, axis=-1)


def _modulation(
    embedding: jax.Array, parts: int, width: int, policy: DTypePolicy, name: str
) -> list[jax.Array]:
    """`parts` vectors of each medium, zero at first; for the compact method that calls it."""
    dense = Dense(parts * width, policy, kernel_init=ZEROS, name=name)
    return jnp.split(dense(embedding), parts, axis=-1)


def _normalized(x: jax.Array) -> jax.Array:
    return layer_normalize(x, jnp.ones(x.shape[-1:]), None, EPS)


def _modulated(x: jax.Array, shift: jax.Array, scale: jax.Array) -> jax.Array:
    return _normalized(x) * (1.0 + scale[:, None]) + shift[:, None]
