"""Sums experts of one neuron each, gathered from tables for a few tokens at a time.

With E experts per token, gathering for all tokens at once would make two arrays [B, T, E, D]. So
tokens go in blocks (ops/token_blocks.py), and the backward pass gathers again.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from megatransformer_jax.ops.token_blocks import join_tokens, map_tokens, split_tokens

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
