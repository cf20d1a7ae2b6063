"""Parameters of the core that each iteration has for itself; all of them start as the identity.

The core's weights are the same in every iteration. What may differ is small: a vector that is added
to the core's input (`RecurrentCore`), a number that each attention and feed-forward layer's update
is multiplied by, a low-rank update of each of their matrices (Relaxed Recursive Transformers,
arXiv 2410.20672), and the weights of hyper-connections. Iteration i has row i of these tables;
iterations beyond the last row have the last one.

A layer's context says in which iteration it runs. Usually that is one number for the whole pass.
Where rows or tokens are at different iterations (draws per row, the parallel sampler) it is an
array; then the low-rank updates of all iterations are computed, and each token keeps its own.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct
from jaxtyping import Array, Float, Int, Shaped

from megatransformer_jax.nn.parameters import matrix, vector
from megatransformer_jax.types import DTypePolicy


@struct.dataclass
class Loop:
    """Where in the loop a layer of the core runs, and what depends on it.

    Attributes:
      iteration: number of the iteration, from 0: of all tokens, or per row or token.
      count: iterations with parameters of their own.
      lora_rank: of the low-rank updates; 0 for none.
      has_scale: updates of layers are multiplied by a learned number.
    """

    iteration: Int[Array, ""] | Int[Array, "#B #T"]
    count: int = struct.field(pytree_node=False)
    lora_rank: int = struct.field(pytree_node=False)
    has_scale: bool = struct.field(pytree_node=False)

    @property
    def row(self) -> Int[Array, "*rows"]:
        """The row of the tables that is read."""
        return jnp.minimum(self.iteration, self.count - 1)

    def of(self, table: Shaped[Array, "I *rest"]) -> Shaped[Array, "*rows_and_rest"]:
        """The row itself, or one per row or token."""
        return jnp.take(table, self.row, axis=0)


def scaled_update(
    module: nn.Module, name: str, update: Float[Array, "B T D"], loop: Loop | None
) -> Float[Array, "B T D"]:
    """A layer's update times the iteration's number, where the model has such; it starts at 1."""
    if loop is None or not loop.has_scale:
        return update
    scale = loop.of(vector(module, name, nn.initializers.ones, (loop.count,)))
    return scale[..., None].astype(update.dtype) * update


def with_low_rank(
    module: nn.Module,
    name: str,
    product: Float[Array, "B T *outputs"],
    x: Float[Array, "B T K"],
    axes: tuple[str | None, ...],
    loop: Loop | None,
    policy: DTypePolicy,
) -> Float[Array, "B T *outputs"]:
    """The product of x with the shared matrix plus x A_i B_i, where the model has such.

    A is normal with variance 1 / K, so that x A has the scale of x; B starts at zero.

    Args:
      module: of the layer.
      name: of the matrix; the parameters are `{name}_loop_a` [I, K, r] and `{name}_loop_b`.
      product: with the shared matrix.
      x: the matrix's input.
      axes: logical names of the matrix's axes, the input's first.
      loop: from the context.
      policy: types.
    """
    if loop is None or not loop.lora_rank:
        return product
    outputs = product.shape[2:]
    shape, rank = (loop.count, x.shape[-1], loop.lora_rank), loop.lora_rank
    a_init = nn.initializers.normal(1 / math.sqrt(x.shape[-1]))
    a = matrix(module, f"{name}_loop_a", a_init, shape, (None, axes[0], None), policy)
    zeros, b_shape = nn.initializers.zeros, (loop.count, rank, *outputs)
    # Small, so whole on every fsdp device; nor is it a matrix by the names of its axes.
    b_axes = (None, None, *("core_out" if axis == "embed" else axis for axis in axes[1:]))
    b = matrix(module, f"{name}_loop_b", zeros, b_shape, b_axes, policy)
    if loop.iteration.ndim == 0:
        return product + jnp.tensordot(x @ loop.of(a), loop.of(b), axes=1)
    own = jax.nn.one_hot(loop.row, loop.count, dtype=x.dtype)
    hidden = jnp.einsum("btk,ikr->btir", x, a) * own[..., None]
    return product + jnp.tensordot(hidden, b, axes=2)


# ------------------------------------------------------------------------------
# Hyper-connections between loops (arXiv 2604.21106, after 2409.19606).
#
# The core's state is n streams h_1 .. h_n of the core's width, side by side in its last axis. What
# an iteration F does to one vector, it does to a mixture u of them, and every stream gets a share
# of the change:
#
#     u = sum_j read_j h_j        h_i <- sum_j mix_ij h_j + write_i (F(u) - u)
#
# Each iteration has its own weights: read, mix and write. They start as read = the stream i mod n
# of iteration i, mix = 1 and write = 1. All streams are the same at first, so they stay the same,
# and the loop is the plain one; training tells them apart, because iterations read different ones.
# Coda and exit gate read the mean of the streams.


class HyperConnections(nn.Module):
    """Reads the streams before an iteration, and writes to them behind it."""

    num_streams: int
    num_iterations: int

    def setup(self) -> None:
        """Declares the weights of all iterations."""
        iterations, streams = self.num_iterations, self.num_streams
        square = (iterations, streams, streams)
        self.read_weights = vector(self, "loop_read", _one_after_another, (iterations, streams))
        self.mix_weights = vector(self, "loop_mix", _identities, square)
        self.write_weights = vector(self, "loop_write", nn.initializers.ones, (iterations, streams))

    def read(self, state: Float[Array, "B T W"], loop: Loop) -> Float[Array, "B T D"]:
        """The mixture that the iteration changes."""
        streams = split_streams(state, self.num_streams).astype(jnp.float32)
        weights = loop.of(self.read_weights)
        return jnp.sum(weights[..., None] * streams, axis=-2).astype(state.dtype)

    def write(
        self,
        state: Float[Array, "B T W"],
        before: Float[Array, "B T D"],
        after: Float[Array, "B T D"],
        loop: Loop,
    ) -> Float[Array, "B T W"]:
        """The streams after an iteration.

        Args:
          state: the streams before it.
          before: what it has read.
          after: what it has made of that.
          loop: which iteration.
        """
        streams = split_streams(state, self.num_streams).astype(jnp.float32)
        change = after.astype(jnp.float32) - before.astype(jnp.float32)
        mix, write = loop.of(self.mix_weights), loop.of(self.write_weights)
        # Sums over a few streams: as products of matrices they would not fuse.
        mixed = jnp.sum(mix[..., None] * streams[..., None, :, :], axis=-2)
        written = mixed + write[..., None] * change[..., None, :]
        return written.astype(state.dtype).reshape(state.shape)


def split_streams(state: Float[Array, "B T W"], num_streams: int) -> Float[Array, "B T I D"]:
    """The state's streams."""
    return state.reshape(*state.shape[:2], num_streams, -1)


def begin_streams(first: Float[Array, "B T D"], num_streams: int) -> Float[Array, "B T W"]:
    """The state whose streams are all the same; `first` itself without hyper-connections (0)."""
    return jnp.tile(first, (1, 1, num_streams)) if num_streams else first


def mean_stream(state: Float[Array, "B T W"], num_streams: int) -> Float[Array, "B T D"]:
    """What reads the state outside of the loop; the state itself without hyper-connections (0)."""
    return jnp.mean(split_streams(state, num_streams), axis=2) if num_streams else state


def _one_after_another(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    del key
    iterations, streams = shape
    return jax.nn.one_hot(jnp.arange(iterations) % streams, streams, dtype=dtype)


def _identities(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    del key
    return jnp.broadcast_to(jnp.eye(shape[-1], dtype=dtype), shape)
