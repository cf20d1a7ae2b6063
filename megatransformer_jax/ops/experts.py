"""Sums a few of very many experts of one neuron each, found by product keys.

With E experts per token, gathering for all tokens at once would make two arrays [B, T, E, D]. So
tokens go in blocks, and the backward pass gathers again.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

# ------------------------------------------------------------------------------
# The mixture: gathers, computes and sums experts, block by block.

Activation = Callable[[jax.Array], jax.Array]


def mix_experts(
    x: Float[Array, "B T D"],
    gates: Float[Array, "B T E"],
    chosen: Int[Array, "B T E"],
    table_in: Float[Array, "N D"],
    table_out: Float[Array, "N D"],
    activation: Activation,
    blocks: int,
) -> Float[Array, "B T D"]:
    """sum over e of gates[e] * activation(x . table_in[chosen[e]]) * table_out[chosen[e]].

    Can be differentiated forward and in reverse. In reverse it makes a gradient of the tables' size
    per block; `mix_experts_for_training` is made for that.

    Args:
      x: tokens.
      gates: weight of each chosen expert.
      chosen: numbers of the chosen experts.
      table_in: what each expert multiplies a token with.
      table_out: what it adds.
      activation: of the neuron.
      blocks: parts that the tokens are cut into.
    """

    def mix(x: jax.Array, gates: jax.Array, chosen: jax.Array) -> jax.Array:
        return _mix_rows(activation, x, gates, table_in[chosen], table_out[chosen])

    mixed: jax.Array = map_tokens(mix, blocks, x, gates, chosen)
    return mixed


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def mix_experts_for_training(
    x: jax.Array,
    gates: jax.Array,
    chosen: jax.Array,
    table_in: jax.Array,
    table_out: jax.Array,
    activation: Activation,
    blocks: int,
) -> jax.Array:
    """`mix_experts` whose gradients of the tables are added up in place, block by block."""
    return mix_experts(x, gates, chosen, table_in, table_out, activation, blocks)


def _forward(
    x: jax.Array,
    gates: jax.Array,
    chosen: jax.Array,
    table_in: jax.Array,
    table_out: jax.Array,
    activation: Activation,
    blocks: int,
) -> tuple[jax.Array, Any]:
    mixed = mix_experts(x, gates, chosen, table_in, table_out, activation, blocks)
    return mixed, (x, gates, chosen, table_in, table_out)


def _backward(
    activation: Activation, blocks: int, kept: tuple[jax.Array, ...], cotangent: jax.Array
) -> tuple[Any, ...]:
    x, gates, chosen, table_in, table_out = kept
    mix = functools.partial(_mix_rows, activation)

    def add_block(sums: Any, block: tuple[jax.Array, ...]) -> tuple[Any, Any]:
        x, gates, chosen, cotangent = block
        _, pull = jax.vjp(mix, x, gates, table_in[chosen], table_out[chosen])
        of_x, of_gates, of_rows_in, of_rows_out = pull(cotangent)
        sum_in, sum_out = sums
        sums = (sum_in.at[chosen].add(of_rows_in), sum_out.at[chosen].add(of_rows_out))
        return sums, (of_x, of_gates)

    # Float32 whatever the tables are: an expert may be chosen by very many tokens.
    zeros = tuple(jnp.zeros(table.shape, jnp.float32) for table in (table_in, table_out))
    # Padding has no cotangent, so what it adds to expert 0 is nothing.
    split = tuple(split_tokens(array, blocks) for array in (x, gates, chosen, cotangent))
    (of_in, of_out), (of_x, of_gates) = jax.lax.scan(add_block, zeros, split)
    of_x, of_gates = (join_tokens(array, x.shape[1]) for array in (of_x, of_gates))
    return of_x, of_gates, None, of_in.astype(table_in.dtype), of_out.astype(table_out.dtype)


mix_experts_for_training.defvjp(_forward, _backward)


def _mix_rows(
    activation: Activation,
    x: jax.Array,
    gates: jax.Array,
    rows_in: jax.Array,
    rows_out: jax.Array,
) -> jax.Array:
    """One block; rows are [B, T, E, D]."""
    hidden = activation(jnp.einsum("btd,bted->bte", x, rows_in.astype(x.dtype)))
    weighted = gates.astype(x.dtype) * hidden
    return jnp.einsum("bte,bted->btd", weighted, rows_out.astype(x.dtype))


# ------------------------------------------------------------------------------
# The best of N keys by comparing a query with 2 sqrt(N) half keys (arXiv 1907.05242).


def retrieve(
    queries: Float[Array, "*batch 2 C"], half_keys: Float[Array, "2 P C"], top_k: int
) -> tuple[Float[Array, "*batch k"], Int[Array, "*batch k"]]:
    """Scores and numbers of the best keys, best first.

    Key number i * P + j is the first half key i and the second half key j, one behind the other;
    its score, the product with the query, is the sum of two. So the best `top_k` of all P^2 keys
    are among the pairs of the best `top_k` of each half, and the result is exact.

    Args:
      queries: both halves.
      half_keys: P of them for each half.
      top_k: at most P.
    """
    scores = jnp.einsum("...hc,hpc->...hp", queries, half_keys, preferred_element_type=jnp.float32)
    best, places = jax.lax.top_k(scores, top_k)  # [..., 2, k]
    # Else XLA on CPU merges what follows with the search and sorts all scores: 12 times slower.
    best, places = jax.lax.optimization_barrier((best, places))
    sums = best[..., 0, :, None] + best[..., 1, None, :]  # [..., k, k]
    chosen, pairs = jax.lax.top_k(sums.reshape(*sums.shape[:-2], top_k * top_k), top_k)
    first = jnp.take_along_axis(places[..., 0, :], pairs // top_k, axis=-1)
    second = jnp.take_along_axis(places[..., 1, :], pairs % top_k, axis=-1)
    return chosen, first * half_keys.shape[1] + second


# ------------------------------------------------------------------------------
# Tokens in blocks, for what needs too much memory on all of them at once.


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
