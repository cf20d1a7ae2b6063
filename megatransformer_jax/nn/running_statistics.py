"""Batch normalisation whose running statistics are parameters that no optimiser moves.

The whole library passes one tree of parameters around, so running statistics live in it too. They
are updated through their gradients: in training, `normalize_by_batch` gives the running mean and
variance the cotangent (running - statistic of the batch), and a count the cotangent 1, whatever is
differentiated. These sum over the iterations of a core, micro-batches and devices, so that

    new = running - (1 - momentum) * gradient / count's gradient

moves towards the mean of all that was seen (training/statistics.py). A call whose output has no
influence on what is differentiated, such as a masked iteration, counts for nothing.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float

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
