"""PEER: a feed-forward layer that retrieves a few of very many experts (arXiv 2407.04153)."""

import math

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float

from megatransformer_jax.config.model import MlpConfig
from megatransformer_jax.nn.activations import get_activation
from megatransformer_jax.nn.initializers import WeightInit, truncated_normal
from megatransformer_jax.nn.norms import layer_normalize
from megatransformer_jax.nn.parameters import matrix, table, vector
from megatransformer_jax.nn.running_statistics import (
    COUNT,
    MEAN,
    VARIANCE,
    RunningStatistics,
    normalize_by_batch,
    normalize_by_running,
)
from megatransformer_jax.ops.expert_mixture import mix_experts, mix_experts_for_training
from megatransformer_jax.ops.product_keys import retrieve
from megatransformer_jax.ops.token_blocks import map_tokens, num_blocks
from megatransformer_jax.sharding.rules import Sharder
from megatransformer_jax.types import DTypePolicy

# Elements that a block of tokens may gather from one table: 16 MiB of float32. That is small beside
# the tables of a million experts, and large beside the cost of a turn of the loop.
MAX_GATHERED = 2**22
_EPS = 1e-5


class Peer(nn.Module):
    """sum over heads and their chosen experts of softmax(score) act(x . in_i) out_i.

    Each head makes a query; the score of expert i is its product with key i, which is two half keys
    behind each other. Heads share keys and experts.

    At the start a head's gates are about 1 / top_k, so `out` is drawn top_k times wider than other
    residual outputs: the layer begins like an MLP of the active neurons.
    """

    config: MlpConfig
    inits: WeightInit
    policy: DTypePolicy
    sharder: Sharder

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        deterministic: bool,
        is_token: Bool[Array, "B T"] | None = None,
    ) -> Float[Array, "B T D"]:
        """Transforms each position by itself, but for the statistics of batch normalisation.

        Args:
          x: tokens.
          deterministic: no dropout, and running statistics in place of the batch's.
          is_token: False for padding, which the batch's statistics leave out. None: no padding.
        """
        config, width = self.config.peer, x.shape[-1]
        active = config.num_heads * config.top_k
        queries = self._queries(x, deterministic, is_token)
        half = config.key_dim // 2
        # Normalised queries then have scores of variance 1 in each half.
        init = truncated_normal(1 / math.sqrt(half))
        key_shape = (2, config.num_keys, half)
        half_keys = matrix(self, "keys", init, key_shape, (None, None, None), self.policy)

        def choose(queries: jax.Array) -> tuple[jax.Array, jax.Array]:
            scores, chosen = retrieve(queries, half_keys, config.top_k)
            gates = jax.nn.softmax(scores, axis=-1)
            flat = (*queries.shape[:2], active)
            return gates.reshape(flat), chosen.reshape(flat)

        gates, chosen = map_tokens(
            choose, self._blocks(x, config.num_heads * 2 * config.num_keys), queries
        )
        gates = nn.Dropout(self.config.dropout_rate)(gates, deterministic=deterministic)
        shape, axes = (config.num_experts, width), ("experts", "embed")
        table_in = table(self, "expert_in", self.inits.input, shape, axes, self.policy)
        wide = truncated_normal(self.inits.residual_std * config.top_k)
        table_out = table(self, "expert_out", wide, shape, axes, self.policy)
        mix = mix_experts if deterministic else mix_experts_for_training
        activation = get_activation(self.config.activation)
        blocks = self._blocks(x, active * width)
        return mix(x, gates, chosen, table_in, table_out, activation, blocks)

    def _blocks(self, x: jax.Array, size_per_token: int) -> int:
        ways = self.sharder.ways("batch")
        return num_blocks(max(1, x.shape[0] // ways), x.shape[1], size_per_token, MAX_GATHERED)

    def _queries(
        self, x: jax.Array, deterministic: bool, is_token: jax.Array | None
    ) -> Float[Array, "B T N 2 C"]:
        """Normalised queries of all heads, in halves."""
        config = self.config.peer
        heads, key_dim = config.num_heads, config.key_dim
        shape, axes = (x.shape[-1], heads, key_dim), ("embed", None, None)
        kernel = matrix(self, "query", self.inits.input, shape, axes, self.policy)
        queries = jnp.einsum("btd,dnc->btnc", x, kernel)
        match config.query_norm:
            case "batch":
                queries = self._batch_normalize(queries, deterministic, is_token)
            case "layer":
                scale = vector(self, "query_scale", nn.initializers.ones, (key_dim,))
                bias = vector(self, "query_bias", nn.initializers.zeros, (key_dim,))
                queries = layer_normalize(queries, scale, bias, _EPS)
        return queries.reshape(*x.shape[:2], heads, 2, key_dim // 2)

    def _batch_normalize(
        self, queries: jax.Array, deterministic: bool, is_token: jax.Array | None
    ) -> jax.Array:
        flat = queries.reshape(*queries.shape[:2], -1)
        zeros, ones, shape = nn.initializers.zeros, nn.initializers.ones, flat.shape[-1:]
        running = RunningStatistics(
            vector(self, MEAN, zeros, shape),
            vector(self, VARIANCE, ones, shape),
            vector(self, COUNT, zeros, ()),
        )
        if deterministic:
            normalized = normalize_by_running(flat, running, _EPS)
        else:
            normalized = normalize_by_batch(flat, is_token, running, _EPS)
        scale = vector(self, "query_scale", ones, shape)
        bias = vector(self, "query_bias", zeros, shape)
        return (normalized * scale + bias).astype(queries.dtype).reshape(queries.shape)
