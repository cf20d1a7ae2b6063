"""The unsettled positions of each row: which are settled, and how they move up.

Column j of a row is the j-th position that is not in the cache yet. Column 0 holds the last final
token; the token in column j + 1 was drawn behind column j, and is drawn again every round.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from megatransformer_jax.nn.kv_cache import KVCache


@struct.dataclass
class Wavefront:
    """What is known of the unsettled positions.

    Attributes:
      tokens: int32 [B, W].
      state: of the core, [B, W, core width].
      iterations: int32 [B, W], since the column's token or one before it has changed. Never more
        than in the column before.
      count: int32 [B], columns in use; 0 once a row has ended.
      new_column: int32 [B], the column that begins in the next round; W for none.
    """

    tokens: Any
    state: Any
    iterations: Any
    count: Any
    new_column: Any

    @property
    def is_used(self) -> Bool[Array, "B W"]:
        """Columns that hold a position."""
        return jnp.arange(self.tokens.shape[1]) < self.count[:, None]

    def positions(self, cache: KVCache) -> Int[Array, "B W"]:
        """Places in each row's sequence; -1 for columns not in use."""
        columns = jnp.arange(self.tokens.shape[1], dtype=jnp.int32)
        return jnp.where(self.is_used, cache.next_position[:, None] + columns, -1)


def begin(
    tokens: Int[Array, "B"],
    state: Float[Array, "B 1 D"],
    is_running: Bool[Array, "B"],
    num_columns: int,
) -> Wavefront:
    """One position per running row: the last token.

    Args:
      tokens: of each row, the last.
      state: the first state with a warm start.
      is_running: rows that have not ended.
      num_columns: W.
    """
    shape = (tokens.shape[0], num_columns)
    return Wavefront(
        tokens=jnp.broadcast_to(tokens[:, None], shape),
        state=jnp.broadcast_to(state, (*shape, state.shape[-1])),
        iterations=jnp.zeros(shape, jnp.int32),
        count=is_running.astype(jnp.int32),
        new_column=jnp.zeros(tokens.shape, jnp.int32),
    )


def count_settled(
    wavefront: Wavefront,
    drawn: Int[Array, "B W"],
    is_settled: Bool[Array, "B W"],
) -> Int[Array, "B"]:
    """First columns of each row that are settled and had the right token to settle with.

    Args:
      wavefront: after a round.
      drawn: tokens behind its columns.
      is_settled: by state or by number of iterations.
    """
    is_right = _with_first(wavefront, drawn)[:, :-1] == wavefront.tokens
    is_final = is_settled & is_right & wavefront.is_used
    return jnp.sum(jnp.cumprod(is_final.astype(jnp.int32), axis=1), axis=1)


def move_up(
    wavefront: Wavefront,
    drawn: Int[Array, "B W"],
    num_final: Int[Array, "B"],
    num_wanted: Int[Array, "B"],
) -> Wavefront:
    """The wavefront of the next round: without its final columns, and with one more position.

    Args:
      wavefront: after a round.
      drawn: tokens behind its columns.
      num_final: first columns of each row that have become final.
      num_wanted: tokens that each row may still get, so no more columns; 0 if it has ended.
    """
    num_columns = drawn.shape[1]
    following = _with_first(wavefront, drawn)
    is_changed = jnp.cumsum(following[:, :-1] != wavefront.tokens, axis=1) > 0
    iterations = jnp.where(is_changed, 0, wavefront.iterations)
    num_left = wavefront.count - num_final
    source = num_final[:, None] + jnp.arange(num_columns)
    # The new position continues, with a warm start, from the state of the one before.
    of_state = jnp.minimum(source, jnp.maximum(wavefront.count - 1, 0)[:, None])
    is_old = jnp.arange(num_columns) < num_left[:, None]
    moved = jnp.take_along_axis(iterations, jnp.minimum(source, num_columns - 1), axis=1)
    count = jnp.minimum(jnp.minimum(num_left + 1, num_columns), num_wanted)
    return Wavefront(
        tokens=jnp.take_along_axis(following, jnp.minimum(source, num_columns), axis=1),
        state=jnp.take_along_axis(wavefront.state, of_state[..., None], axis=1),
        iterations=jnp.where(is_old, moved, 0),
        count=count,
        new_column=jnp.where(num_left < count, num_left, num_columns),
    )


def _with_first(wavefront: Wavefront, drawn: jax.Array) -> jax.Array:
    """The newest token of each column and of the one behind the last, [B, W + 1]."""
    return jnp.concatenate([wavefront.tokens[:, :1], drawn], axis=1)
