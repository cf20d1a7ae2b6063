"""The nonlinearities that a config may name."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

Activation = Callable[[jax.Array], jax.Array]


def get_activation(name: str) -> Activation:
    """The function behind `mlp.activation`.

    Raises:
      ValueError: for a name that `config.model.ACTIVATIONS` does not list.
    """
    match name:
        case "gelu":
            return functools.partial(jax.nn.gelu, approximate=False)
        case "gelu_tanh":
            return functools.partial(jax.nn.gelu, approximate=True)
        case "relu":
            return jax.nn.relu
        case "relu_squared":
            return lambda x: jnp.square(jax.nn.relu(x))
        case "silu":
            return jax.nn.silu
        case "sigmoid":
            return jax.nn.sigmoid
        case "tanh":
            return jnp.tanh
        case "identity":
            return lambda x: x
    raise ValueError(
        f"unknown activation {name!r}; see config.model.ACTIVATIONS for the known ones"
    )
