"""Token embedding with additive positions, the language-model head, and images as patches."""

import math

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from megatransformer_jax.config.model import STACKS, ModelConfig
from megatransformer_jax.nn.cut_matrices import CutMatrix, gather_matrix
from megatransformer_jax.nn.parameters import WeightInit, matrix, table, vector
from megatransformer_jax.nn.quantized import einsum, record_input, take_rows
from megatransformer_jax.ops.positions import sinusoidal_embedding
from megatransformer_jax.sharding.rules import Sharder
from megatransformer_jax.types import DTypePolicy

# ------------------------------------------------------------------------------
# Tokens.


def embedding_scale(config: ModelConfig) -> float:
    """What token embeddings are multiplied by."""
    return math.sqrt(config.width) if config.scale_embeddings else 1.0


class TextEmbedding(nn.Module):
    """Tokens to vectors and, where the head is tied, vectors to logits."""

    config: ModelConfig
    inits: WeightInit
    policy: DTypePolicy
    sharder: Sharder

    def setup(self) -> None:
        """Declares the table, learned positions and the head, as far as configured."""
        config, axes = self.config, ("vocab", "embed")
        shape = (config.vocab_size, config.width)
        self.table = matrix(self, "embedding", self.inits.embedding, shape, axes, self.policy)
        if isinstance(self.table, CutMatrix):
            # Lookup and tied head then share the copies, and their gradients are summed as one.
            self.table = self.table.copied()
        if config.positions.scheme == "learned":
            shape = (config.max_length, config.width)
            self.position_table = matrix(
                self,
                "position_embedding",
                self.inits.embedding,
                shape,
                (None, "embed"),
                self.policy,
            )
        if not config.tie_embeddings:
            shape = (config.vocab_size, config.width)
            self.head = matrix(self, "head", self.inits.embedding, shape, axes, self.policy)
        if config.head_bias:
            self.bias = vector(
                self, "head_bias", nn.initializers.zeros, (config.vocab_size,), ("vocab",)
            )
        self.dropout = nn.Dropout(config.embedding_dropout_rate)

    def __call__(
        self, tokens: Int[Array, "B T"], positions: Int[Array, "B T"], deterministic: bool
    ) -> Float[Array, "B T D"]:
        """Embeds tokens; adds learned or sinusoidal positions after scaling."""
        # A lookup cannot use a table whose width is cut as the batch is: gather it first.
        table = gather_matrix(self.table, ("vocab", "embed"), self.sharder)
        x = take_rows(table, tokens) * embedding_scale(self.config)
        if self.config.positions.scheme == "learned":
            x = x + jnp.take(self.position_table, positions, axis=0)
        elif self.config.positions.scheme == "sinusoidal":
            x = x + sinusoidal_embedding(positions, self.config.width).astype(x.dtype)
        x = self.dropout(x, deterministic=deterministic)
        return self.sharder.constrain(x, "batch", "length", None)

    def logits(self, x: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """Float32 scores of every token of the vocabulary."""
        weight = self.table if self.config.tie_embeddings else self.head
        record_input(self, "embedding" if self.config.tie_embeddings else "head", x)
        logits = einsum("btd,vd->btv", x, weight, preferred_element_type=jnp.float32)
        if self.config.head_bias:
            logits = logits + self.bias
        if self.config.logit_softcap is not None:
            cap = self.config.logit_softcap
            logits = cap * jnp.tanh(logits / cap)
        return self.sharder.constrain(logits, "batch", "length", "vocab")


class ValueEmbedding(nn.Module):
    """What `model.value_embedding` adds to values, before the gates: a table per chosen layer.

    It depends on the tokens alone, so a pass looks it up once, for all iterations.
    """

    config: ModelConfig
    inits: WeightInit
    policy: DTypePolicy
    sharder: Sharder

    @nn.compact
    def __call__(
        self, tokens: Int[Array, "B T"], is_text: Bool[Array, "B T"] | None = None
    ) -> dict[str, Float[Array, "L B T K H"]]:
        """Rows of the chosen layers of 'prelude', 'core' and 'coda', as far as they have any.

        Args:
          tokens: ids.
          is_text: where there are tokens; elsewhere the rows are zeros. None: everywhere.
        """
        found = {}
        for stack in STACKS:
            first = self.config.first_layer(stack)
            width = self.config.core_width if stack == "core" else self.config.width
            rows = [
                self._look_up(tokens, first + place, self.config.head_dim(width))
                for place in self.config.value_layers(stack)
            ]
            if rows:
                found[stack] = jnp.stack(rows)
            if rows and is_text is not None:
                found[stack] = jnp.where(is_text[..., None, None], found[stack], 0)
        return found

    def _look_up(
        self, tokens: Int[Array, "B T"], layer: int, head_dim: int
    ) -> Float[Array, "B T K H"]:
        kv_heads, axes = self.config.attention.kv_heads, ("vocab", "embed")
        shape = (self.config.vocab_size, kv_heads * head_dim)
        name = f"layer_{layer}_embedding"
        weight = table(self, name, self.inits.embedding, shape, axes, self.policy)
        weight = self.sharder.gather_params(weight, axes)
        rows = take_rows(weight, tokens).astype(self.policy.compute)
        rows = self.sharder.constrain(rows, "batch", "length", None)
        return rows.reshape(*tokens.shape, kv_heads, head_dim)


# ------------------------------------------------------------------------------
# Images as patches.


def patchify(
    images: Float[Array, "N height width C"], patch_size: int
) -> Float[Array, "N P pixels"]:
    """Squares of `patch_size`, row by row, each with all its values: rows, then columns, then C.

    Raises:
      ValueError: if patches do not fill the image.
    """
    count, height, width, channels = images.shape
    if height % patch_size or width % patch_size:
        raise ValueError(
            f"an image of {height}x{width} is not filled by patches of {patch_size}x{patch_size}; "
            "choose a divisor of both sides."
        )
    rows, columns = height // patch_size, width // patch_size
    squares = images.reshape(count, rows, patch_size, columns, patch_size, channels)
    return squares.transpose(0, 1, 3, 2, 4, 5).reshape(count, rows * columns, -1)


def unpatchify(
    patches: Float[Array, "N P pixels"], patch_size: int, shape: tuple[int, int, int]
) -> Float[Array, "N height width C"]:
    """The images of this shape (height, width, C) whose `patchify` is given."""
    height, width, channels = shape
    rows, columns = height // patch_size, width // patch_size
    squares = patches.reshape(-1, rows, columns, patch_size, patch_size, channels)
    return squares.transpose(0, 1, 3, 2, 4, 5).reshape(-1, *shape)
