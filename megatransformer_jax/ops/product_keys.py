"""The best of N keys by comparing a query with 2 sqrt(N) half keys (arXiv 1907.05242)."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


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
