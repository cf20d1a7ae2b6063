"""From pieces of media, patches or frames, to vectors of the model's width."""

import math

from flax import linen as nn
from jaxtyping import Array, Float

from megatransformer_jax.config.model import ModelConfig
from megatransformer_jax.nn.embedding import embedding_scale
from megatransformer_jax.nn.parameters import matrix, truncated_normal, vector, weight_init
from megatransformer_jax.types import DTypePolicy


class MediaEmbedding(nn.Module):
    """Linear, plus positions, then the dropout of embeddings.

    Starts such that pieces of unit size become vectors as large as the text's embeddings.
    """

    config: ModelConfig
    policy: DTypePolicy

    @nn.compact
    def __call__(
        self,
        pieces: Float[Array, "N P pieces"],
        positions: Float[Array, "P D"],
        deterministic: bool,
    ) -> Float[Array, "N P D"]:
        """Embeds each piece by itself; in the compute type."""
        config, inputs = self.config, pieces.shape[-1]
        std = weight_init(config, config.width).embedding_std * embedding_scale(config)
        init = truncated_normal(std / math.sqrt(inputs))
        shape, axes = (inputs, config.width), (None, "embed")
        kernel = matrix(self, "kernel", init, shape, axes, self.policy)
        bias = vector(self, "bias", nn.initializers.zeros, (config.width,))
        x = pieces.astype(kernel.dtype) @ kernel + (bias + positions).astype(kernel.dtype)
        dropout = nn.Dropout(config.embedding_dropout_rate)
        embedded: Float[Array, "N P D"] = dropout(x, deterministic=deterministic)
        return embedded
