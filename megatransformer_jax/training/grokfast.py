"""Grokfast (arXiv 2405.20233): gradients with their slow part amplified, as optax transformations.

The paper holds that parameters which generalise move with the slow part of the gradients; adding
more of it shortens the wait for grokking.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax


class GrokfastEmaState(NamedTuple):
    """State of `grokfast_ema`."""

    average: Any  # tree of the gradients


class GrokfastMaState(NamedTuple):
    """State of `grokfast_ma`."""

    count: Any  # int32 [], gradients so far
    gradients: Any  # tree of the gradients, each [window, ...]: a ring


def grokfast_ema(
    alpha: jax.typing.ArrayLike = 0.98, lamb: jax.typing.ArrayLike = 2.0
) -> optax.GradientTransformation:
    """h = alpha h + (1 - alpha) g from h = 0; the gradient becomes g + lamb h.

    Args:
      alpha: decay of the average, in [0, 1).
      lamb: how much of the average is added.

    Example:
      >>> optimizer = optax.chain(grokfast_ema(0.98, 2.0), optax.adamw(1e-3))
      >>> state = optimizer.init({"kernel": jnp.ones((2, 2))})
    """

    def init(params: Any) -> GrokfastEmaState:
        return GrokfastEmaState(jax.tree.map(jnp.zeros_like, params))

    def update(
        updates: Any, state: GrokfastEmaState, params: Any = None
    ) -> tuple[Any, GrokfastEmaState]:
        del params
        average = jax.tree.map(
            lambda h, g: (alpha * h + (1 - alpha) * g).astype(h.dtype), state.average, updates
        )
        return _amplified(updates, average, lamb), GrokfastEmaState(average)

    return optax.GradientTransformation(init, update)


def grokfast_ma(
    window: int = 100, lamb: jax.typing.ArrayLike = 5.0, warmup: bool = True
) -> optax.GradientTransformation:
    """The gradient becomes g + lamb times the mean of the last `window`, g included.

    It keeps `window` copies of the gradients.

    Args:
      window: gradients in the mean, at least 1.
      lamb: how much of the mean is added.
      warmup: adds nothing until there are `window` gradients, as the paper does. False: adds the
        mean of those there are.

    Raises:
      ValueError: if `window` is below 1.

    Example:
      >>> optimizer = optax.chain(grokfast_ma(window=100, lamb=5.0), optax.adamw(1e-3))
      >>> state = optimizer.init({"kernel": jnp.ones((2, 2))})
    """
    if window < 1:
        raise ValueError(f"window={window}: the mean needs at least 1 gradient")

    def init(params: Any) -> GrokfastMaState:
        ring = jax.tree.map(lambda p: jnp.zeros((window, *p.shape), p.dtype), params)
        return GrokfastMaState(jnp.zeros([], jnp.int32), ring)

    def update(
        updates: Any, state: GrokfastMaState, params: Any = None
    ) -> tuple[Any, GrokfastMaState]:
        del params
        place = state.count % window
        ring = jax.tree.map(
            lambda kept, g: kept.at[place].set(g.astype(kept.dtype)), state.gradients, updates
        )
        count = optax.safe_increment(state.count)
        filled = jnp.minimum(count, window)
        weight = jnp.where((filled == window) | (not warmup), lamb, 0.0)
        mean = jax.tree.map(lambda kept: jnp.sum(kept, axis=0) / filled, ring)
        return _amplified(updates, mean, weight), GrokfastMaState(count, ring)

    return optax.GradientTransformation(init, update)


def _amplified(updates: Any, slow: Any, lamb: jax.typing.ArrayLike) -> Any:
    return jax.tree.map(lambda g, h: (g + lamb * h).astype(g.dtype), updates, slow)
