"""PEER: a feed-forward layer that retrieves a few of very many experts (arXiv 2407.04153).

Queries are batch-normalised; the second half of this file is that normalisation.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct
from jaxtyping import Array, Bool, Float

from megatransformer_jax.config.model import MlpConfig
from megatransformer_jax.nn.mlp import get_activation
from megatransformer_jax.nn.norms import layer_normalize
from megatransformer_jax.nn.parameters import WeightInit, matrix, table, truncated_normal, vector
from megatransformer_jax.ops.experts import (
    map_tokens,
    mix_experts,
    mix_experts_for_training,
    num_blocks,
    retrieve,
)
from megatransformer_jax.sharding.rules import Sharder
from megatransformer_jax.types import DTypePolicy

# ------------------------------------------------------------------------------
# The layer.

# Elements that a block of tokens may gather from one table: 16 MiB of float32. That is small
# compared with the tables of a million experts, and large compared with the cost of a turn of the
# loop.
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


# ------------------------------------------------------------------------------
# Batch normalisation whose running statistics are parameters that no optimiser moves.
#
# The whole library passes one tree of parameters around, so running statistics live in it too. They
# are updated through their gradients: in training, `normalize_by_batch` gives the running mean and
# variance the cotangent (running - statistic of the batch), and a count the cotangent 1, whatever
# is differentiated. These sum over the iterations of a core, micro-batches and devices, so that
#
#     new = running - (1 - momentum) * gradient / count's gradient
#
# moves towards the mean of all that was seen (training/trainable.py). A call whose output has no
# influence on what is differentiated, such as a masked iteration, counts for nothing.

# Names of the parameters; `optimizer.update` must see no gradient of theirs.
MEAN, VARIANCE, COUNT = "query_mean", "query_var", "query_count"


@struct.dataclass
class RunningStatistics:
    """What evaluation normalises by.

    Attributes:
      mean: of each channel.
      variance: of each channel, unbiased.
      count: always 0; its gradient counts the uses.
    """

    mean: Float[Array, "C"]
    variance: Float[Array, "C"]
    count: Float[Array, ""]


def is_statistic(path: tuple[Any, ...]) -> bool:
    """Whether a leaf of a tree of parameters, by its path, is a statistic and not a weight."""
    return getattr(path[-1], "key", None) in (MEAN, VARIANCE, COUNT)


def normalize_by_running(
    x: Float[Array, "B T C"], running: RunningStatistics, eps: float
) -> Float[Array, "B T C"]:
    """(x - running mean) / sqrt(running variance + eps), float32."""
    x = x.astype(jnp.float32)
    # No gradient: it would be taken for a report where a loss has passes of this kind too.
    running = jax.lax.stop_gradient(running)
    return (x - running.mean) * jax.lax.rsqrt(running.variance + eps)


def normalize_by_batch(
    x: Float[Array, "B T C"],
    is_token: Bool[Array, "B T"] | None,
    running: RunningStatistics,
    eps: float,
) -> Float[Array, "B T C"]:
    """(x - mean) / sqrt(variance + eps) with the statistics of the batch (arXiv 1502.03167).

    Gradients flow through the statistics. With at least two tokens, the running statistics get the
    cotangents that this module's docstring tells of.

    Args:
      x: all tokens of the batch; on a mesh, of all devices.
      is_token: False for padding, which does not count. None: everything counts.
      running: the parameters.
      eps: added to the variance.
    """
    x = x.astype(jnp.float32)
    weight = jnp.ones(x.shape[:2]) if is_token is None else is_token.astype(jnp.float32)
    count = jnp.sum(weight)
    total = jnp.maximum(count, 1.0)
    mean = jnp.einsum("bt,btc->c", weight, x) / total
    variance = jnp.einsum("bt,btc->c", weight, jnp.square(x - mean)) / total
    normalized = (x - mean) * jax.lax.rsqrt(variance + eps)
    unbiased = variance * total / jnp.maximum(total - 1.0, 1.0)
    seen = jax.lax.stop_gradient((mean, unbiased, (count > 1).astype(jnp.float32)))
    return _report(normalized, (running.mean, running.variance, running.count), seen)


@jax.custom_vjp
def _report(x: jax.Array, running: tuple[jax.Array, ...], seen: tuple[jax.Array, ...]) -> jax.Array:
    """`x`; its backward pass tells `running` what was seen."""
    del running, seen
    return x


def _forward(
    x: jax.Array, running: tuple[jax.Array, ...], seen: tuple[jax.Array, ...]
) -> tuple[jax.Array, Any]:
    return x, (running, seen)


def _backward(kept: Any, cotangent: jax.Array) -> tuple[Any, ...]:
    (running_mean, running_variance, _), (mean, variance, is_enough) = kept
    counts = is_enough * jnp.any(cotangent != 0).astype(jnp.float32)
    told = (counts * (running_mean - mean), counts * (running_variance - variance), counts)
    return cotangent, told, jax.tree.map(jnp.zeros_like, (mean, variance, is_enough))


_report.defvjp(_forward, _backward)
