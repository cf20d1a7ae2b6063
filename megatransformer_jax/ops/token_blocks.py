"""Cuts the tokens of a batch into blocks, for what needs too much memory on all at once."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def num_blocks(rows: int, length: int, size_per_token: int, max_size: int) -> int:
    """The fewest blocks of at most `max_size` elements (but of a token per row at least).

    Args:
      rows: rows that one device holds.
      length: tokens per row.
      size_per_token: elements that a token needs.
      max_size: elements per block.
    """
    columns = max(1, max_size // (rows * size_per_token))
    return math.ceil(length / columns)


def split_tokens(array: jax.Array, blocks: int) -> jax.Array:
    """[B, T, ...] to [blocks, B, ceil(T / blocks), ...], padded with zeros.

    Token t goes to block t % blocks. So each block has tokens of every part of a row: rows that
    are cut over devices keep them all busy.
    """
    batch, length, *rest = array.shape
    columns = math.ceil(length / blocks)
    missing = columns * blocks - length
    if missing:
        array = jnp.pad(array, [(0, 0), (0, missing), *((0, 0) for _ in rest)])
    return jnp.moveaxis(array.reshape(batch, columns, blocks, *rest), 2, 0)


def join_tokens(array: jax.Array, length: int) -> jax.Array:
    """The inverse of `split_tokens`: [blocks, B, columns, ...] to [B, length, ...]."""
    blocks, batch, columns, *rest = array.shape
    return jnp.moveaxis(array, 0, 2).reshape(batch, columns * blocks, *rest)[:, :length]


def map_tokens(function: Callable[..., Any], blocks: int, *arrays: jax.Array) -> Any:
    """`function` of [B, columns, ...] arrays, applied block by block, recomputed for gradients.

    Args:
      function: from arrays whose first axes are tokens to a tree of such arrays.
      blocks: 1 calls it once on everything.
      *arrays: [B, T, ...].
    """
    if blocks == 1:
        return function(*arrays)
    length = arrays[0].shape[1]
    split = tuple(split_tokens(array, blocks) for array in arrays)
    mapped = jax.lax.map(lambda block: jax.checkpoint(function)(*block), split)
    return jax.tree.map(lambda array: join_tokens(array, length), mapped)
