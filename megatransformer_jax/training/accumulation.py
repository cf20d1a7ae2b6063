"""Adds up what micro-batches give, one after the other, so that one at a time is in memory."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key


def sum_micro_batches(
    function: Callable[[Any, Key[Array, ""]], Any], inputs: Any, key: Key[Array, ""], parts: int
) -> Any:
    """The sum of `function(part, key of the part)` over `parts` micro-batches.

    Args:
      function: from a part of `inputs` and a key to a tree of arrays.
      inputs: tree of arrays [B, ...], cut along B, and of scalars, which every part gets.
      key: with one part it is the part's, else each part's number is folded into it.
      parts: divides B.
    """
    if parts == 1:
        return function(inputs, key)

    def add_part(total: Any, numbered: tuple[Any, jax.Array]) -> tuple[Any, None]:
        part, index = numbered
        result = function(part, jax.random.fold_in(key, index))
        return jax.tree.map(jnp.add, total, result), None

    split = jax.tree.map(functools.partial(_split_rows, parts=parts), inputs)
    first = jax.tree.map(lambda array: array[0], split)
    zeros = jax.tree.map(jnp.zeros_like, jax.eval_shape(function, first, key))
    return jax.lax.scan(add_part, zeros, (split, jnp.arange(parts)))[0]


def _split_rows(array: jax.Array, parts: int) -> jax.Array:
    """[B, ...] to [parts, B/parts, ...], interleaved: each device keeps the rows that it holds."""
    if array.ndim == 0:
        return jnp.broadcast_to(array, (parts,))
    rows = array.shape[0] // parts
    return array.reshape(rows, parts, *array.shape[1:]).swapaxes(0, 1)
