"""Declares parameters together with the meaning of their axes."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from megatransformer_jax.types import DTypePolicy


def matrix(
    module: nn.Module,
    name: str,
    init: jax.nn.initializers.Initializer,
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
    weight = module.param(name, nn.with_partitioning(init, axes), shape, policy.param)
    return weight.astype(policy.compute)


def vector(
    module: nn.Module,
    name: str,
    init: jax.nn.initializers.Initializer,
    shape: tuple[int, ...],
    axes: tuple[str | None, ...] | None = None,
) -> jax.Array:
    """A float32 scale or bias of `module`; without `axes` every device has all of it."""
    axes = (None,) * len(shape) if axes is None else axes
    return module.param(name, nn.with_partitioning(init, axes), shape, jnp.float32)


def axes_of(boxed: Any) -> Any:
    """The tree of logical axis names of a tree of freshly initialised (boxed) parameters."""
    return jax.tree.map(
        lambda box: box.names, boxed, is_leaf=lambda node: isinstance(node, nn.Partitioned)
    )
