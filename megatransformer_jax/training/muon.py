"""Muon for fused kernels: which parameters it makes orthogonal, and as which matrices."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax

from megatransformer_jax.config.option import ConfigError
from megatransformer_jax.training.parameter_paths import map_named

# Axes counted from the end, inputs and outputs of a matrix; what is left are separate matrices.
#
# A fused kernel holds several maps of the same input, whose gradients differ in size; made
# orthogonal as one matrix, the largest would set the pace of the others. So each is a matrix by
# itself:
#   qkv [D, K, G+2, H]: per place in the group, D x (K H). With K = N heads these are the query, key
#     and value matrices; with grouped queries there are G query matrices of K heads each.
#   up [D, 2, F]: gate and up, D x F each.
#   output [N, H, D]: heads are inputs together, (N H) x D.
# A leading axis of layers, if there is one, is left over too: a matrix per layer.
_AXES = {
    "qkv": ((-4,), (-3, -1)),
    "output": ((-3, -2), (-1,)),
    "up": ((-3,), (-1,)),
    "down": ((-2,), (-1,)),
    "state_kernel": ((-2,), (-1,)),
    "embedding_kernel": ((-2,), (-1,)),
}


def muon_axes(params: Any) -> Any:
    """A tree with `optax.contrib.MuonDimensionNumbers` for Muon's parameters, None for AdamW's.

    Goes by name, so that what is not known as a matrix between activations stays with AdamW:
    embeddings and the head (rows looked up by token), experts' tables, vectors, and the diagonal
    adapter, whose matrix starts as the identity and has no decay.
    """
    return map_named(_axes_of, params)


def scale_by_muon(
    momentum: float, nesterov: bool, newton_schulz_steps: int, consistent_rms: float | None
) -> optax.GradientTransformation:
    """Momentum made orthogonal, scaled by the matrix's shape; for Muon's parameters alone.

    Args:
      momentum: decay of the momentum.
      nesterov: whether it looks ahead.
      newton_schulz_steps: iterations that bring the singular values near 1.
      consistent_rms: root mean square of an update of full rank (arXiv 2502.16982): the orthogonal
        matrix times consistent_rms sqrt(max(inputs, outputs)). None: times
        sqrt(max(1, outputs / inputs)), as Muon's author has it.

    Example:
      >>> optimizer = optax.chain(scale_by_muon(0.95, True, 5, 0.2), optax.scale(-1e-3))
      >>> state = optimizer.init({"up": jnp.ones((8, 2, 16))})
    """
    orthogonal = optax.contrib.scale_by_muon(
        ns_steps=newton_schulz_steps,
        beta=momentum,
        nesterov=nesterov,
        mu_dtype=jnp.float32,
        weight_dimension_numbers=muon_axes,
    )

    def scale(update: jax.Array, axes: optax.contrib.MuonDimensionNumbers) -> jax.Array:
        inputs = math.prod(update.shape[axis] for axis in axes.reduction_axis)
        outputs = math.prod(update.shape[axis] for axis in axes.output_axis)
        if consistent_rms is None:
            return update * math.sqrt(max(1.0, outputs / inputs))
        return update * (consistent_rms * math.sqrt(max(inputs, outputs)))

    by_shape = optax.stateless(
        lambda updates, params: jax.tree.map(scale, updates, muon_axes(updates))
    )
    return optax.chain(orthogonal, by_shape)


def labels(params: Any) -> Any:
    """A tree of 'muon' and 'adamw', for `optax.partition`."""
    return map_named(lambda path, leaf: "muon" if _axes_of(path, leaf) else "adamw", params)


def check_muon(params: Any) -> None:
    """Checks that Muon has something to act on.

    Raises:
      ConfigError: if AdamW would get all parameters.
    """
    if "muon" not in jax.tree.leaves(labels(params)):
        raise ConfigError(
            "optimizer.name",
            "'muon' acts on none of the parameters that are trained, only on matrices of layers "
            f"({', '.join(_AXES)}); set it to 'adamw', or let fine_tuning train some of these.",
        )


def _axes_of(path: str, leaf: Any) -> optax.contrib.MuonDimensionNumbers | None:
    del leaf
    axes = _AXES.get(path.rpartition("/")[2])
    return None if axes is None else optax.contrib.MuonDimensionNumbers(*axes)
