"""Norms of gradients and weights by layer."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from megatransformer_jax.config.run import RunConfig
from megatransformer_jax.models.megatransformer import MegaTransformer
from megatransformer_jax.nn.peer import is_statistic
from megatransformer_jax.training.objective import Place, make_objective
from megatransformer_jax.training.parameter_paths import path_text
from megatransformer_jax.types import Batch, HostOrDeviceArray


class LayerNorms(NamedTuple):
    """Root of the sum of squares over all parameters of a layer, by its name.

    Attributes:
      gradient: of the loss with respect to them, float32 [] by layer.
      weight: of themselves.
    """

    gradient: dict[str, HostOrDeviceArray]
    weight: dict[str, HostOrDeviceArray]


def norms_by_layer(tree: Any) -> dict[str, Float[Array, ""]]:
    """Norms of the groups of arrays that belong together (`layer_of`), in the tree's order.

    Running statistics are no weights, and what takes the place of their gradients is none.
    """
    squares: dict[str, jax.Array] = {}
    for path, array in jax.tree_util.tree_leaves_with_path(tree):
        if is_statistic(path):
            continue
        name = layer_of(path_text(path))
        square = jnp.sum(jnp.square(array.astype(jnp.float32)))
        squares[name] = squares[name] + square if name in squares else square
    return {name: jnp.sqrt(total) for name, total in squares.items()}


def layer_of(path: str) -> str:
    """The layer of a parameter: 'core/layers/layer_0/mlp/up' is of 'core/layers/layer_0'.

    Outside of layers it is the part of the model, 'embedding', or of the core, 'core/adapter'.
    """
    parts = path.split("/")
    for number, part in enumerate(parts):
        if part.startswith("layer_"):
            return "/".join(parts[: number + 1])
    return "/".join(parts[:2]) if parts[0] == "core" else parts[0]


def gradient_norms(
    model: MegaTransformer,
    config: RunConfig,
    params: Any,
    rows: Batch,
    step: Int[Array, ""],
    *,
    num_steps: int,
    seed: int,
) -> LayerNorms:
    """Norms for what training minimises (`make_objective`, dropout included), on these rows.

    Args:
      model: the model.
      config: of the run.
      params: the model's parameters.
      rows: all of a batch is read.
      step: optimiser steps done, for terms that warm up.
      num_steps: iterations; gradients flow through the last ones, as in training.
      seed: of first state and dropout.
    """
    objective = make_objective(model, config)
    place = Place(step, jnp.maximum(jnp.sum(rows.loss_mask), 1.0), 1.0)

    def loss(params: Any) -> jax.Array:
        return objective(params, rows, jnp.int32(num_steps), jax.random.key(seed), place)[0]

    return LayerNorms(norms_by_layer(jax.grad(loss)(params)), norms_by_layer(params))
