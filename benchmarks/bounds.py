"""What the machine reaches at simple work: products, a model's weights, memory.

Decoding is compared with these, measured in the same rounds.
"""

from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.timing import Phase
from megatransformer_jax.config.model import ModelConfig

MATMUL_SIZE = 1024
MATMULS_PER_ROUND = 5
MATMUL_FLOPS = MATMULS_PER_ROUND * 2 * MATMUL_SIZE**3
STREAM_BYTES = 256 * 2**20
STREAM_ROWS = 64
# Tokens per round in the chain of products with weights.
CHAIN_TOKENS = 16


def product_chain(dtype: Any) -> Phase:
    """Products of large square matrices, one after the other: `MATMUL_FLOPS` per round."""
    # Of norm about 2, so that a chain of products stays in range.
    shape = (MATMUL_SIZE, MATMUL_SIZE)
    matrix = jax.random.normal(jax.random.key(1), shape, dtype) / MATMUL_SIZE**0.5

    @jax.jit
    def multiply(matrix: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(0, MATMULS_PER_ROUND, lambda _, left: left @ matrix, matrix)

    return Phase(f"{MATMUL_SIZE} x {MATMUL_SIZE} products", lambda: matrix, multiply)


def stream() -> Phase:
    """The maximum of an array that no cache holds: reads `STREAM_BYTES` per round."""
    array = jnp.ones((STREAM_ROWS, STREAM_BYTES // 4 // STREAM_ROWS), jnp.float32)
    return Phase("stream", lambda: array, jax.jit(lambda array: jnp.max(array, axis=1)))


def weight_matrices(config: ModelConfig) -> tuple[list[tuple[int, int]], ...]:
    """(inputs, outputs) of the matrices that a token is multiplied with, in their order.

    Returns:
      Those before the core, those of one iteration, and those behind the core.

    Raises:
      ValueError: if the model is not of the kind that this counts.
    """
    if config.core_width != config.width or config.recurrence.adapter != "linear":
        raise ValueError("counts models with a linear adapter and a core of the model's width only")
    width, attention, mlp = config.width, config.attention, config.mlp
    heads = attention.num_heads * config.head_dim(width)
    fused = heads + 2 * attention.kv_heads * config.head_dim(width)
    branches = 2 if mlp.kind == "gated" else 1
    layer = [
        (width, fused),
        (heads, width),
        (width, branches * mlp.hidden_width),
        (mlp.hidden_width, width),
    ]
    adapter, head = (width, width), (width, config.vocab_size)
    return (
        [*layer * config.prelude_layers, adapter],
        [adapter, *layer * config.core_layers],
        [*layer * config.coda_layers, head],
    )


def weight_bytes(config: ModelConfig, depth: int, dtype: Any) -> int:
    """Bytes of weights that one token reads: those of the core once per iteration."""
    before, core, behind = (
        sum(inputs * outputs for inputs, outputs in part) for part in weight_matrices(config)
    )
    return (before + depth * core + behind) * jnp.dtype(dtype).itemsize


def weight_chain(config: ModelConfig, depth: int, rows: int, dtype: Any) -> Phase:
    """The products of decoding and nothing else: `CHAIN_TOKENS` tokens, `rows` at a time.

    The matrices have the shapes, the order and the repetitions of the model's, so what the caches
    hold of them when they are needed again is the same.
    """
    shapes = weight_matrices(config)
    keys = iter(jax.random.split(jax.random.key(2), sum(map(len, shapes))))
    parts = [
        # Square root of the inputs: the vectors keep their length.
        [jax.random.normal(next(keys), shape, dtype) * shape[0] ** -0.5 for shape in part]
        for part in shapes
    ]
    # The head as the embedding is stored, [V, D].
    parts[-1][-1] = parts[-1][-1].T.copy()
    first = jax.random.normal(jax.random.key(3), (rows, config.width), dtype)

    @jax.jit
    def run(arguments: tuple[Any, jax.Array]) -> jax.Array:
        (before, core, behind), first = arguments
        *layers, head = behind

        def token(_: Any, previous: jax.Array) -> jax.Array:
            x = _products(before, first + 1e-3 * previous)
            x = jax.lax.fori_loop(0, depth, lambda _, x: _products(core, x), x)
            logits = _fit(_products(layers, x), head.shape[1]) @ head.T
            return _fit(logits, config.width)

        return jax.lax.fori_loop(0, CHAIN_TOKENS, token, first)

    return Phase(f"weights, {rows} rows", lambda: (parts, first), run)


def _products(matrices: list[jax.Array], x: jax.Array) -> jax.Array:
    for matrix in matrices:
        x = _fit(x, matrix.shape[0]) @ matrix
    return x


def _fit(x: jax.Array, width: int) -> jax.Array:
    """To that many columns; all of x counts, so the compiler can drop no part of a product."""
    rows, columns = x.shape
    if columns < width:
        return jnp.pad(x, ((0, 0), (0, width - columns)))
    count = -(-columns // width)
    padded = jnp.pad(x, ((0, 0), (0, count * width - columns)))
    return jnp.sum(padded.reshape(rows, count, width), axis=1) * count**-0.5
