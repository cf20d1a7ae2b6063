"""Declares parameters: the meaning of their axes, and initial values by role."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.errors import ScopeParamShapeError

from megatransformer_jax.config.model import ModelConfig
from megatransformer_jax.nn.quantized import is_matrix_node
from megatransformer_jax.types import DTypePolicy

# ------------------------------------------------------------------------------
# Parameters.

# From (key, shape, type) to an array.
Initializer = Callable[[jax.Array, tuple[int, ...], Any], jax.Array]


def matrix(
    module: nn.Module,
    name: str,
    init: Initializer,
    shape: tuple[int, ...],
    axes: tuple[str | None, ...],
    policy: DTypePolicy,
) -> Any:
    """A weight of `module`, stored in the policy's parameter type, returned in its compute type.

    A quantised weight (nn/quantized.py) comes as it is; `multiply` and `einsum` read both.

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
) -> Any:
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
    return cast(jax.Array, _declare(module, name, init, shape, axes, jnp.dtype(jnp.float32)))


def _declare(
    module: nn.Module,
    name: str,
    init: Initializer,
    shape: tuple[int, ...],
    axes: tuple[str | None, ...],
    dtype: jnp.dtype,
) -> Any:
    if module.has_variable("params", name):
        stored: Any = nn.meta.unbox(module.get_variable("params", name))
        # The arrays of a quantised matrix, or of copies, have shapes of other meaning.
        if not is_matrix_node(stored):
            check_shapes(module, name, stored, jax.ShapeDtypeStruct(shape, dtype))
        return stored
    # Linen keeps the box with the axes to itself and returns what is in it.
    return module.param(name, nn.with_partitioning(init, axes), shape, dtype)


def check_shapes(module: nn.Module, name: str, stored: Any, expected: Any) -> None:
    """Raises Linen's error if a stored parameter (or tree of them) has other shapes than declared.

    `nn.Module.param` checks the same by tracing the initialiser in every pass, which took a third
    of the time that it takes to trace a model.
    """
    pairs = zip(jax.tree.leaves(stored), jax.tree.leaves(expected), strict=False)
    for found, wanted in pairs:
        if jnp.shape(found) != wanted.shape:
            path = module.scope.path_text if module.scope is not None else ""
            raise ScopeParamShapeError(name, path, jnp.shape(found), wanted.shape)


def axes_of(boxed: Any) -> Any:
    """The tree of logical axis names of a tree of freshly initialised (boxed) parameters."""
    return jax.tree.map(
        lambda box: box.names, boxed, is_leaf=lambda node: isinstance(node, nn.Partitioned)
    )


# ------------------------------------------------------------------------------
# Weight initialisation by role: input matrices, outputs into the residual stream, embeddings.

# Normal draws are cut here, in standard deviations, as Huginn does.
TRUNCATION = 3.0


@dataclasses.dataclass(frozen=True)
class WeightInit:
    """Standard deviations of a model's matrices. See `InitConfig.scheme` for the rules."""

    input_std: float
    residual_std: float
    embedding_std: float

    @property
    def input(self) -> jax.nn.initializers.Initializer:
        """Matrices that read the residual stream."""
        return truncated_normal(self.input_std)

    @property
    def residual(self) -> jax.nn.initializers.Initializer:
        """Matrices that write into the residual stream."""
        if self.residual_std == 0:
            return nn.initializers.zeros
        return truncated_normal(self.residual_std)

    @property
    def embedding(self) -> jax.nn.initializers.Initializer:
        """Token and learned position embeddings, and an untied head."""
        return truncated_normal(self.embedding_std)


def weight_init(config: ModelConfig, width: int) -> WeightInit:
    """The standard deviations for layers of `width`.

    Depth counts every layer that a token passes at the mean number of iterations, because that is
    how often a shared core writes into the stream (Huginn's `takase`).
    """
    recurrent_layers = config.core_layers * config.recurrence.mean_steps
    depth = config.prelude_layers + recurrent_layers + config.coda_layers
    scale = 1.0 / math.sqrt(2 * depth)
    scheme = config.init.scheme
    std = math.sqrt(2 / (5 * width)) if scheme == "takase" else config.init.std
    residual_std = std if scheme == "normal" else std * scale
    return WeightInit(std, 0.0 if config.init.zero_outputs else residual_std, std)


def truncated_normal(std: float) -> jax.nn.initializers.Initializer:
    """Normal with this standard deviation before the cut at `TRUNCATION` of them."""
    return nn.initializers.truncated_normal(std, lower=-TRUNCATION, upper=TRUNCATION)
