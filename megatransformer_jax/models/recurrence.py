"""Iterates the core: first without gradients, then with, at one compilation for any depth.

Reverse-mode differentiation needs a loop of known length, and memory for each of its turns.
Truncated backpropagation (arXiv 2502.05171, section 3) needs both only for the last
`backprop_depth` iterations. So the loop has two phases:

1. a loop with a traced count, on arguments behind `stop_gradient`: it stores nothing;
2. a scan of static length `backprop_depth`, differentiated and, if asked, rematerialised.

Rows (or tokens) may have counts of their own. All end together: a row with a smaller count joins
later and shows its initial state until then. Aligned at the end, every row's last iterations lie in
the second phase; aligned at the start, a short row would end before it and would train nothing.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

# (parameters, state, prepared injection, iteration) -> next state
Iterate = Callable[[Any, jax.Array, jax.Array, jax.Array], jax.Array]


def recur(
    iterate: Iterate,
    params: Any,
    prepared: Float[Array, "B T D"],
    state: Float[Array, "B T D"],
    num_steps: Int[Array, "*draws"],
    *,
    backprop_depth: int,
    unroll: int = 1,
) -> Float[Array, "B T D"]:
    """Applies `iterate` to `state` `num_steps` times.

    Args:
      iterate: one iteration of the core; pure.
      params: its parameters. They and `prepared` are arguments, not captured, so that the first
        phase can cut their gradients.
      prepared: what is injected in every iteration.
      state: the state to begin with.
      num_steps: traced count: one for all ([]), per row ([B]) or per token ([B, T]). May be 0.
      backprop_depth: last iterations that gradients flow through. 0: the whole loop has a traced
        count and cannot be differentiated in reverse (inference).
      unroll: iterations of the second phase that are laid out per turn of its scan.

    Returns:
      The state after the last iteration; rows whose count is 0 keep theirs.
    """
    total = jnp.max(num_steps)
    begin = _first_iteration(num_steps, total)

    def advance(params: Any, prepared: jax.Array, state: jax.Array, step: jax.Array) -> jax.Array:
        return jnp.where(step >= begin, iterate(params, state, prepared, step), state)

    num_stopped = jnp.maximum(total - backprop_depth, 0)
    if backprop_depth:
        stopped_params, stopped_prepared, state = jax.lax.stop_gradient((params, prepared, state))
    else:
        stopped_params, stopped_prepared = params, prepared
    state = jax.lax.fori_loop(
        0, num_stopped, lambda i, s: advance(stopped_params, stopped_prepared, s, i), state
    )
    if not backprop_depth:
        return state
    # Draws below backprop_depth make the first of these iterations negative: before every begin.
    steps = total - backprop_depth + jnp.arange(backprop_depth)
    state, _ = jax.lax.scan(
        lambda s, i: (advance(params, prepared, s, i), None), state, steps, unroll=unroll
    )
    return state


def recur_observed(
    iterate: Iterate,
    params: Any,
    prepared: Float[Array, "B T D"],
    state: Float[Array, "B T D"],
    observe: Callable[[jax.Array], Any],
    *,
    num_steps: int,
    backprop_depth: int,
) -> Any:
    """Iterates a known number of times and looks at every state.

    Gradients flow through iterations as in `recur`. They reach whatever `observe` captures from all
    iterations, and the core from the last `backprop_depth`.

    Args:
      iterate: one iteration of the core; pure.
      params: its parameters.
      prepared: what is injected in every iteration.
      state: the state to begin with.
      observe: state -> pytree; recomputed in the backward pass, so that its inside is not stored.
      num_steps: static, at least 1.
      backprop_depth: static; more than `num_steps` counts as `num_steps`.

    Returns:
      The observations, stacked along a new first axis of length `num_steps`.
    """
    num_stopped = max(num_steps - backprop_depth, 0)
    # What is observed is smaller than what it is computed from: logits of every iteration.
    observe = jax.checkpoint(observe)

    def advance(params: Any, prepared: jax.Array) -> Callable[[jax.Array, jax.Array], Any]:
        def body(state: jax.Array, step: jax.Array) -> tuple[jax.Array, Any]:
            state = iterate(params, state, prepared, step)
            return state, observe(state)

        return body

    stopped_params, stopped_prepared, state = jax.lax.stop_gradient((params, prepared, state))
    parts = []
    if num_stopped:  # Else a loop of no turns would be compiled for nothing.
        body = advance(stopped_params, stopped_prepared)
        state, early = jax.lax.scan(body, state, jnp.arange(num_stopped))
        parts.append(early)
    steps = jnp.arange(num_stopped, num_steps)
    _, late = jax.lax.scan(advance(params, prepared), state, steps)
    return jax.tree.map(lambda *parts: jnp.concatenate(parts), *parts, late)


def _first_iteration(num_steps: jax.Array, total: jax.Array) -> jax.Array:
    """The iteration in which each row or token joins, shaped to broadcast over [B, T, D]."""
    begin = total - num_steps
    return begin.reshape(begin.shape + (1,) * (3 - begin.ndim)) if begin.ndim else begin
