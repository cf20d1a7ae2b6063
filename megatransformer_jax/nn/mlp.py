"""Feed-forward layers, plain and gated, and the nonlinearities that a config may name."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from megatransformer_jax.config.model import MlpConfig
from megatransformer_jax.nn.loop_parameters import Loop, with_low_rank
from megatransformer_jax.nn.parameters import WeightInit, matrix, vector
from megatransformer_jax.nn.quantized import einsum, record_input
from megatransformer_jax.types import DTypePolicy

# ------------------------------------------------------------------------------
# The layers.


class Mlp(nn.Module):
    """down(act(up(x))), or gated: down(act(gate(x)) * up(x)) (arXiv 2002.05202).

    Gate and up are one matrix [D, 2, F], gate first, so that one product serves both.
    """

    config: MlpConfig
    inits: WeightInit
    policy: DTypePolicy

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], deterministic: bool, loop: Loop | None = None
    ) -> Float[Array, "B T D"]:
        """Transforms each position by itself; `loop` is that of the layer's context."""
        width, hidden_width = x.shape[-1], self.config.hidden_width
        parts = 2 if self.config.kind == "gated" else 1
        shape, axes = (width, parts, hidden_width), ("embed", None, "mlp")
        kernel = matrix(self, "up", self.inits.input, shape, axes, self.policy)
        record_input(self, "up", x)
        hidden = einsum("btd,dpf->btpf", x, kernel)
        hidden = with_low_rank(self, "up", hidden, x, axes, loop, self.policy)
        if self.config.bias:
            bias = vector(self, "up_bias", nn.initializers.zeros, shape[1:], axes[1:])
            hidden = hidden + bias.astype(hidden.dtype)
        activated = get_activation(self.config.activation)(hidden[..., 0, :])
        if parts == 2:
            activated = activated * hidden[..., 1, :]
        activated = nn.Dropout(self.config.dropout_rate)(activated, deterministic=deterministic)
        down_axes = ("mlp", "embed")
        kernel = matrix(
            self, "down", self.inits.residual, (hidden_width, width), down_axes, self.policy
        )
        record_input(self, "down", activated)
        output = einsum("btf,fd->btd", activated, kernel)
        output = with_low_rank(self, "down", output, activated, down_axes, loop, self.policy)
        if self.config.bias:
            bias = vector(self, "down_bias", nn.initializers.zeros, (width,))
            output = output + bias.astype(output.dtype)
        return output


# ------------------------------------------------------------------------------
# The nonlinearities that a config may name.

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
        case "relu_squared_half":
            return lambda x: 0.5 * jnp.square(jax.nn.relu(x))
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
