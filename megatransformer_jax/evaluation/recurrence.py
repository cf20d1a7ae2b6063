"""How the core's state moves from iteration to iteration: residual, contraction, spectral radius.

A core whose Jacobian at its fixed point has a spectral radius below 1 returns to it after a small
disturbance, however often it is iterated; above 1 it leaves. Residuals of the first iterations do
not show that.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Key

from megatransformer_jax.models.megatransformer import MegaTransformer, with_xla_attention
from megatransformer_jax.models.passes.observed import open_batch
from megatransformer_jax.types import Batch

# ------------------------------------------------------------------------------
# Residual, contraction and size of the state.


@struct.dataclass
class IterationCurves:
    """Means over a batch's sequences; entry i - 1 is iteration i. |.| runs over a sequence's tokens
    (not its padding), the places of its media, and channels.

    Attributes:
      residual: |h_i - h_{i-1}| / |h_i|, how far iteration i moved the state.
      contraction: |h_{i+1} - h_i| / |h_i - h_{i-1}|. Below 1 the iterations approach a fixed
        point, above 1 they move apart. 0 once the state stands still.
      state_norm: |h_i| per token, the root of the mean over tokens of their squared lengths.
    """

    residual: Float[Array, "n"]
    contraction: Float[Array, "n"]
    state_norm: Float[Array, "n"]


@functools.partial(jax.jit, static_argnames=("model", "num_steps"))
def iteration_curves(
    model: MegaTransformer, params: Any, batch: Batch, num_steps: int, key: Key[Array, ""]
) -> IterationCurves:
    """Iterates the core over a batch and measures every iteration.

    Args:
      model: the model.
      params: its parameters.
      batch: tokens, positions, segments and media are read. Rows of padding only do not count.
      num_steps: n, at least 1; static. One more iteration is run for the last contraction.
      key: for the first state.

    Raises:
      ValueError: if the model has no core or num_steps is below 1.
    """
    if num_steps < 1:
        raise ValueError(f"num_steps is {num_steps}; it must be at least 1.")
    entered, core = open_batch(model, params, batch)
    is_token = entered.is_token

    def iterate(
        state: jax.Array, iteration: jax.Array
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        new_state = core.iterate(state, iteration)
        change = new_state.astype(jnp.float32) - state.astype(jnp.float32)
        return new_state, (_length(change, is_token), _length(new_state, is_token))

    state = core.first_state(key)
    _, (changes, sizes) = jax.lax.scan(iterate, state, jnp.arange(num_steps + 1))
    num_tokens = jnp.sum(is_token, axis=1)
    weights = (num_tokens > 0) / jnp.maximum(jnp.sum(num_tokens > 0), 1)
    per_token = sizes / jnp.sqrt(jnp.maximum(num_tokens, 1))
    return IterationCurves(
        residual=_ratio(changes[:-1], sizes[:-1]) @ weights,
        contraction=_ratio(changes[1:], changes[:-1]) @ weights,
        state_norm=per_token[:-1] @ weights,
    )


def _length(state: Float[Array, "B T D"], is_token: jax.Array) -> Float[Array, "B"]:
    masked = jnp.where(is_token[..., None], state.astype(jnp.float32), 0.0)
    return jnp.linalg.norm(masked.reshape(masked.shape[0], -1), axis=1)


def _ratio(above: jax.Array, below: jax.Array) -> jax.Array:
    # A state that stands still, or has no tokens, has moved by 0 and not by 0 / 0.
    is_zero = above == 0
    return jnp.where(is_zero, 0.0, above / jnp.where(is_zero, 1.0, below))


# ------------------------------------------------------------------------------
# Spectral radius of the core's Jacobian, by power iteration with JVPs.


@functools.partial(jax.jit, static_argnames=("model", "num_steps", "power_iterations"))
def spectral_radius(
    model: MegaTransformer,
    params: Any,
    batch: Batch,
    num_steps: int,
    key: Key[Array, ""],
    power_iterations: int,
) -> Float[Array, "n"]:
    """The largest |eigenvalue| of J_i = d h_i / d h_{i-1}, mean over a batch's sequences.

    J_i maps the whole state [T, D] of a sequence, without its padding, to itself, at the state that
    the model has reached by then.

    The estimate is the mean growth per product with J_i over the second half of the products, which
    settles for complex eigenvalues too. Under causal attention J_i is block triangular over tokens
    and far from normal, so with few products it is too large rather than too small.

    Args:
      model: the model; attention runs by the XLA kernel, as fused ones have no JVP.
      params: its parameters.
      batch: tokens, positions, segments and media are read. Rows of padding only do not count.
      num_steps: n, at least 1; static.
      key: for the first state and the first vectors.
      power_iterations: products with each J_i, at least 2; static. 30 give two digits or so.

    Raises:
      ValueError: if the model has no core or a number is too small.
    """
    if num_steps < 1 or power_iterations < 2:
        raise ValueError(
            f"num_steps is {num_steps} and power_iterations {power_iterations}; they must be at "
            "least 1 and 2."
        )
    model = with_xla_attention(model)
    entered, core = open_batch(model, params, batch)
    is_token = entered.is_token
    state_key, vector_key = jax.random.split(key)

    def iterate(state: jax.Array, turn: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        iteration, key = turn
        new_state, product = jax.linearize(lambda state: core.iterate(state, iteration), state)
        vector = jax.random.normal(key, state.shape).astype(state.dtype)
        return new_state, growth_rate(product, vector, is_token, power_iterations)

    turns = (jnp.arange(num_steps), jax.random.split(vector_key, num_steps))
    _, rates = jax.lax.scan(iterate, core.first_state(state_key), turns)
    has_tokens = jnp.any(is_token, axis=1)
    return rates @ (has_tokens / jnp.maximum(jnp.sum(has_tokens), 1))


def growth_rate(
    product: Callable[[jax.Array], jax.Array],
    vector: Float[Array, "B T D"],
    is_token: Bool[Array, "B T"],
    power_iterations: int,
) -> Float[Array, "B"]:
    """Mean growth per product of a linear map with a vector, over the second half of the products.

    Args:
      product: the linear map, block diagonal over B.
      vector: to begin with.
      is_token: False for what is left out of the map.
      power_iterations: products.

    Returns:
      Per sequence; 0 if the map sends the vector to 0.
    """

    def normalize(vector: jax.Array) -> tuple[jax.Array, jax.Array]:
        vector = jnp.where(is_token[..., None], vector, 0.0)
        size = jnp.linalg.norm(vector.astype(jnp.float32), axis=(1, 2))
        scale = jnp.where(size == 0, 1.0, size)
        return (vector / scale[:, None, None]).astype(vector.dtype), size

    def multiply(vector: jax.Array, _: None) -> tuple[jax.Array, jax.Array]:
        return normalize(product(vector))

    _, sizes = jax.lax.scan(multiply, normalize(vector)[0], None, length=power_iterations)
    settled = sizes[power_iterations // 2 :]
    return jnp.exp(jnp.mean(jnp.log(settled), axis=0))
