"""Declares parameters together with the meaning of their axes."""

from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
from flax import linen as nn

from megatransformer_jax.types import DTypePolicy

# From (key, shape, type) to an array.
Initializer = Callable[[jax.Array, tuple[int, ...], Any], jax.Array]


def matrix(
    module: nn.Module,
    name: str,
    init: Initializer,
    shape: tuple[int, ...],
    axes: tuple[str | None, ...],
    policy: DTypePolicy,
) -> jax.Array:
    """A weight of `module`, stored in the policy's parameter type, returned in its compute type.

    Args:
      module: the module whose compact method is running.
      name: the parameter's name.
      init: initialiser.
      shape: shape.
      axes: logical name per axis (see sharding/rules.py), None where an axis is never cut.
      policy: types.
    """
    return table(module, name, init, shape, axes, policy).astype(policy.compute)


def table(
    module: nn.Module,
    name: str,
    init: Initializer,
    shape: tuple[int, ...],
    axes: tuple[str | None, ...],
    policy: DTypePolicy,
) -> jax.Array:
    """As `matrix`, but returned as stored: who looks up a few rows casts these alone."""
    return _declare(module, name, init, shape, axes, policy.param)


def vector(
    module: nn.Module,
    name: str,
    init: Initializer,
    shape: tuple[int, ...],
    axes: tuple[str | None, ...] | None = None,
) -> jax.Array:
    """A float32 scale or bias of `module`; without `axes` every device has all of it."""
    axes = (None,) * len(shape) if axes is None else axes
    return _declare(module, name, init, shape, axes, jnp.dtype(jnp.float32))


def _declare(
    module: nn.Module,
    name: str,
    init: Initializer,
    shape: tuple[int, ...],
    axes: tuple[str | None, ...],
    dtype: jnp.dtype,
) -> jax.Array:
    # Linen keeps the box with the axes to itself and returns what is in it.
    return cast(jax.Array, module.param(name, nn.with_partitioning(init, axes), shape, dtype))


def axes_of(boxed: Any) -> Any:
    """The tree of logical axis names of a tree of freshly initialised (boxed) parameters."""
    return jax.tree.map(
        lambda box: box.names, boxed, is_leaf=lambda node: isinstance(node, nn.Partitioned)
    )
