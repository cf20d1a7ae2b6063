"""How the core's state moves from iteration to iteration: residual, contraction, size."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Key

from megatransformer_jax.models.megatransformer import MegaTransformer
from megatransformer_jax.models.passes.observed import core_step, first_state, open_core
from megatransformer_jax.types import Batch


@struct.dataclass
class IterationCurves:
    """Means over a batch's sequences; entry i - 1 is iteration i. |.| runs over a sequence's tokens
    (not its padding) and channels.

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
      batch: tokens, positions and segments are read. Rows of padding only do not count.
      num_steps: n, at least 1; static. One more iteration is run for the last contraction.
      key: for the first state.

    Raises:
      ValueError: if the model has no core or num_steps is below 1.
    """
    if num_steps < 1:
        raise ValueError(f"num_steps is {num_steps}; it must be at least 1.")
    tokens, positions, segment_ids = map(
        jnp.asarray, (batch.tokens, batch.positions, batch.segment_ids)
    )
    core = open_core(model, params, tokens, positions=positions, segment_ids=segment_ids)
    step = core_step(model, core)
    is_token = segment_ids > 0

    def iterate(state: jax.Array, _: None) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        new_state = step(core.params, state, core.prepared)
        change = new_state.astype(jnp.float32) - state.astype(jnp.float32)
        return new_state, (_length(change, is_token), _length(new_state, is_token))

    state = first_state(model, core, key)
    _, (changes, sizes) = jax.lax.scan(iterate, state, None, length=num_steps + 1)
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
