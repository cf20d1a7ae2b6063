"""Attention layers: self-attention with fused projections, and attention to a condition."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from megatransformer_jax.config.model import ModelConfig
from megatransformer_jax.nn.context import NEW_ROWS, CachedPass, LayerContext
from megatransformer_jax.nn.conv import FAN_IN, ZEROS
from megatransformer_jax.nn.cut_matrices import fill_heads
from megatransformer_jax.nn.loop_parameters import Loop, with_low_rank
from megatransformer_jax.nn.norms import rms_normalize
from megatransformer_jax.nn.parameters import Initializer, WeightInit, matrix, vector
from megatransformer_jax.nn.quantized import einsum, multiply, record_input
from megatransformer_jax.ops.attention import Kernel, attention
from megatransformer_jax.ops.attention_xla import MASKED_LOGIT, Dropout, LogitTerms, masked_softmax
from megatransformer_jax.ops.cached_attention import apart, cached_attention, side_by_side
from megatransformer_jax.ops.positions import apply_rotary
from megatransformer_jax.sharding.rules import Sharder
from megatransformer_jax.types import DTypePolicy

# ------------------------------------------------------------------------------
# Self-attention.


class SelfAttention(nn.Module):
    """Multi-head (K = N) or grouped-query (K < N) attention over one sequence.

    One matrix holds all projections as [D, K, G+2, H]: per KV head its G queries, then its key,
    then its value. So one product serves all three, and a cut over K (mesh axis `tensor`) keeps
    every group whole on its device.
    """

    config: ModelConfig
    inits: WeightInit
    policy: DTypePolicy
    sharder: Sharder
    platform: str

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], context: LayerContext, layer: int | Int[Array, ""] = 0
    ) -> Float[Array, "B T D"]:
        """Attends within `x`, and to the cache if the context has one.

        `layer` picks the row of the context's head mask and the entry of its cache.
        """
        query, key, value = self._project(x, context.loop)
        query, key = self._prepare(query, key, context)
        if context.value_embedding is not None:
            value = self._add_embedding(value, x, context.value_embedding)
        query = self.sharder.constrain(query, "batch", "length", "heads", None)
        key = self.sharder.constrain(key, "batch", "length", "kv_heads", None)
        value = self.sharder.constrain(value, "batch", "length", "kv_heads", None)
        # For diagnostics; costs nothing unless a caller makes the collection mutable.
        self.sow("intermediates", "query_key_value", (query, key, value))
        if context.cached is not None:
            key, value = self._remember(key, value, context.cached, layer)
        if context.cached is not None and not context.cached.is_first:
            mixed = self._attend_to_cache(query, key, value, context, context.cached, layer)
        else:
            mixed = self._attend(query, key, value, context, layer)
        return self._merge(mixed, x.shape[-1], context.loop)

    def _attend(
        self,
        query: jax.Array,
        key: jax.Array,
        value: jax.Array,
        context: LayerContext,
        layer: int | jax.Array,
    ) -> jax.Array:
        config = self.config.attention
        dropout = None
        if config.dropout_rate and not context.deterministic:
            dropout = Dropout(config.dropout_rate, self.make_rng("dropout"))
        return attention(
            query,
            key,
            value,
            context.mask,
            Kernel(self.platform, config.kernel, self.sharder),
            terms=self._terms(context),
            head_mask=self._head_mask(context, layer),
            dropout=dropout,
        )

    def _remember(
        self, key: jax.Array, value: jax.Array, cached: CachedPass, layer: int | jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Hands the new keys and values out; those of inactive tokens are the frozen ones."""
        if cached.frozen is not None and cached.is_active is not None:
            is_active = cached.is_active[:, :, None, None]
            frozen_key, frozen_value = apart(cached.frozen[layer], key.shape[-1])
            key = jnp.where(is_active, key, frozen_key.transpose(0, 2, 1, 3))
            value = jnp.where(is_active, value, frozen_value.transpose(0, 2, 1, 3))
        width = cached.rows.pairs.shape[-1]
        pairs = side_by_side(key.transpose(0, 2, 1, 3), value.transpose(0, 2, 1, 3), width)
        self.sow(NEW_ROWS, "pairs", pairs)
        return key, value

    def _attend_to_cache(
        self,
        query: jax.Array,
        key: jax.Array,
        value: jax.Array,
        context: LayerContext,
        cached: CachedPass,
        layer: int | jax.Array,
    ) -> jax.Array:
        rows: Any = cached.rows
        mixed = cached_attention(
            query,
            key,
            value,
            cached.query_positions,
            cached.key_positions,
            rows.replace(entry=rows.entry + layer, sharder=self.sharder),
            window=context.mask.window,
            terms=self._terms(context),
        )
        head_mask = self._head_mask(context, layer)
        return mixed if head_mask is None else mixed * head_mask.astype(mixed.dtype)[:, None]

    def _terms(self, context: LayerContext) -> LogitTerms:
        slopes = context.alibi_slopes
        slopes = None if slopes is None else self.sharder.fill_heads(slopes)
        return LogitTerms(self.config.attention.logit_softcap, slopes)

    def _head_mask(self, context: LayerContext, layer: int | jax.Array) -> jax.Array | None:
        mask = context.head_mask
        return None if mask is None else self.sharder.fill_heads(mask[layer], value=1.0)

    def _project(self, x: jax.Array, loop: Loop | None) -> tuple[jax.Array, jax.Array, jax.Array]:
        config = self.config.attention
        width, group = x.shape[-1], config.num_heads // config.kv_heads
        head_dim = self.config.head_dim(width)
        shape = (width, config.kv_heads, group + 2, head_dim)
        axes = ("embed", "head_rows", None, "head_width")
        kernel = matrix(self, "qkv", self.inits.input, shape, axes, self.policy)
        kernel = fill_heads(kernel, axes, self.sharder)
        record_input(self, "qkv", x)
        fused = einsum("btd,dkgh->btkgh", x, kernel)
        fused = with_low_rank(self, "qkv", fused, x, axes, loop, self.policy)
        if config.qkv_bias:
            names = ("head_rows", None, None)
            bias = vector(self, "qkv_bias", nn.initializers.zeros, shape[1:], names)
            fused = fused + self.sharder.fill_heads(bias).astype(fused.dtype)
        query = fused[..., :group, :].reshape(*x.shape[:2], -1, head_dim)
        return query, fused[..., group, :], fused[..., group + 1, :]

    def _prepare(
        self, query: jax.Array, key: jax.Array, context: LayerContext
    ) -> tuple[jax.Array, jax.Array]:
        """Normalises, shifts and rotates queries and keys, as far as configured."""
        config = self.config.attention
        if config.qk_norm and not config.qk_norm_after_rotary:
            query, key = self._normalize(query, key)
        if config.qk_bias:
            query = query + self._bias("query_bias", config.num_heads, query)
            key = key + self._bias("key_bias", config.kv_heads, key)
        if context.rotary is not None:
            convention = self.config.positions.rotary_convention
            query = apply_rotary(query, context.rotary, convention)
            key = apply_rotary(key, context.rotary, convention)
        if config.qk_norm and config.qk_norm_after_rotary:
            query, key = self._normalize(query, key)
        return query, key

    def _bias(self, name: str, num_heads: int, heads: jax.Array) -> jax.Array:
        shape, axes = (num_heads, heads.shape[-1]), ("head_rows", None)
        bias = vector(self, name, nn.initializers.zeros, shape, axes)
        return self.sharder.fill_heads(bias).astype(heads.dtype)

    def _normalize(self, query: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        return (
            self._normalize_heads(query, "query_scale"),
            self._normalize_heads(key, "key_scale"),
        )

    def _normalize_heads(self, heads: jax.Array, name: str) -> jax.Array:
        """RMS over each head of [B, T, heads, H], or over all of them together."""
        config = self.config.attention
        eps = self.config.norm.eps if config.qk_norm_eps is None else config.qk_norm_eps
        of_width = config.qk_norm_span == "width"
        shape, axes = (
            (heads.shape[-2:], ("head_rows", None)) if of_width else (heads.shape[-1:], None)
        )
        scale = None
        if config.qk_norm_scale:
            scale = vector(self, name, nn.initializers.ones, shape, axes)
        return rms_normalize(heads, scale, eps, num_axes=len(shape))

    def _add_embedding(self, value: jax.Array, x: jax.Array, rows: jax.Array) -> jax.Array:
        """v + 2 sigmoid(gate(x)) e per key/value head; the gate starts at 1."""
        channels = self.config.value_embedding.gate_channels
        shape, axes = (channels, value.shape[-2]), (None, "head_rows")
        kernel = matrix(self, "value_gate", nn.initializers.zeros, shape, axes, self.policy)
        gate = 2.0 * jax.nn.sigmoid((x[..., :channels] @ kernel).astype(jnp.float32))
        return value + gate[..., None].astype(value.dtype) * rows.astype(value.dtype)

    def _merge(self, mixed: jax.Array, width: int, loop: Loop | None) -> jax.Array:
        shape = (self.config.attention.num_heads, mixed.shape[-1], width)
        axes = ("head_rows", "head_width", "embed")
        kernel = matrix(self, "output", self.inits.residual, shape, axes, self.policy)
        kernel = fill_heads(kernel, axes, self.sharder)
        # As one axis N*H: over two, XLA on CPU transposes the kernel again in every call.
        mixed = mixed.reshape(*mixed.shape[:2], -1)
        record_input(self, "output", mixed)
        merged = multiply(mixed, kernel.reshape(-1, width))
        names = ("heads", "embed")
        merged = with_low_rank(self, "output", merged, mixed, names, loop, self.policy)
        if self.config.attention.output_bias:
            bias = vector(self, "output_bias", nn.initializers.zeros, (width,))
            merged = merged + bias.astype(merged.dtype)
        return merged


# ------------------------------------------------------------------------------
# Attention from a medium to its condition.


class CrossAttention(nn.Module):
    """Multi-head attention to `context`; by default what it adds starts at zero."""

    head_width: int
    policy: DTypePolicy
    output_init: Initializer = ZEROS

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
        to_output = matrix(
            self, "output_kernel", self.output_init, (width, width), axes, self.policy
        )
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
