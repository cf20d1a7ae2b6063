"""Attention from a medium to its condition."""

import math

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float

from megatransformer_jax.nn.dense import FAN_IN, ZEROS
from megatransformer_jax.nn.parameters import matrix
from megatransformer_jax.ops.attention_xla import MASKED_LOGIT, masked_softmax
from megatransformer_jax.types import DTypePolicy


class CrossAttention(nn.Module):
    """Multi-head attention to `context`; what it adds starts at zero."""

    head_width: int
    policy: DTypePolicy

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "N T D"],
        context: Float[Array, "N C D2"],
        is_context: Bool[Array, "N C"],
    ) -> Float[Array, "N T D"]:
        """Reads the vectors of the context that there are; exact zeros if there is none."""
        count, length, width = x.shape
        num_heads = width // self.head_width
        keys_shape, axes = (context.shape[-1], 2 * width), (None, None)
        to_query = matrix(self, "query_kernel", FAN_IN, (width, width), axes, self.policy)
        to_keys = matrix(self, "context_kernel", FAN_IN, keys_shape, axes, self.policy)
        to_output = matrix(self, "output_kernel", ZEROS, (width, width), axes, self.policy)
        query = (x.astype(to_query.dtype) @ to_query).reshape(count, length, num_heads, -1)
        both = (context.astype(to_keys.dtype) @ to_keys).reshape(
            count, context.shape[1], 2, num_heads, -1
        )
        key, value = both[:, :, 0], both[:, :, 1]
        logits = jnp.einsum("bqnh,bcnh->bnqc", query, key, preferred_element_type=jnp.float32)
        bias = jnp.where(is_context, 0.0, MASKED_LOGIT)[:, None, None]
        weights = masked_softmax(logits / math.sqrt(self.head_width) + bias)
        mixed = jnp.einsum("bnqc,bcnh->bqnh", weights.astype(value.dtype), value)
        # Without a bias, so that nothing comes of no context.
        return mixed.reshape(count, length, width) @ to_output
