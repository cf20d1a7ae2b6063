"""Weight decay: which parameters have it, and the transformation that adds it."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from megatransformer_jax.training.parameter_paths import map_named

# Leaf names of parameters without weight decay. Rank does not tell: a fused norm scale or a bias
# per head is a matrix by shape, and a fused kernel has three or four axes.
UNDECAYED_NAMES = ("scale", "bias", "embedding", "a_log", "dt_bias", "b_matrix", "alpha")


def decay_mask(params: Any) -> Any:
    """A tree of bools: True where weight decay applies, which is on matrices.

    Vectors have none, nor has any parameter whose name is or ends in one of `UNDECAYED_NAMES`
    (`bias`, `qk_bias`, `scale`, ...).
    """
    return map_named(_is_decayed, params)


def add_decayed_weights(rates: Callable[[Any], Any]) -> optax.GradientTransformationExtraArgs:
    """Adds to each update its parameter times a rate of its own (`optax.add_decayed_weights`).

    Args:
      rates: from a tree of parameters, which may lack some, to a tree of floats. Where the rate is
        0 the update is left as it is.

    Example:
      >>> decay = add_decayed_weights(lambda params: jax.tree.map(lambda p: 0.1, params))
      >>> optimizer = optax.chain(optax.scale_by_adam(), decay, optax.scale(-1e-3))
    """

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        if params is None:
            raise ValueError("weight decay needs the parameters: update(updates, state, params)")
        decayed = jax.tree.map(lambda u, rate, p: u + rate * p, updates, rates(updates), params)
        return decayed, state

    decay = optax.GradientTransformation(optax.init_empty_state, update)
    return optax.masked(decay, lambda params: jax.tree.map(lambda rate: rate > 0, rates(params)))


def _is_decayed(path: str, leaf: Any) -> bool:
    name = path.rpartition("/")[2]
    undecayed = any(name == plain or name.endswith("_" + plain) for plain in UNDECAYED_NAMES)
    return not undecayed and jnp.ndim(leaf) > 1
