"""A gate on the core's state: how likely is it that a token should stop iterating here?"""

import math

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from megatransformer_jax.config.model import ModelConfig
from megatransformer_jax.nn.norms import Norm
from megatransformer_jax.nn.parameters import vector


class ExitGate(nn.Module):
    """The gate of PonderNet (arXiv 2107.05407): sigmoid(w . norm(state) + b).

    w starts at 0 and b such that every iteration stops with probability 1 / mean_steps, so that
    the mean depth begins near that of training.
    """

    config: ModelConfig

    @nn.compact
    def __call__(self, state: Float[Array, "B T D"]) -> Float[Array, "B T"]:
        """Logits, float32, of stopping after the iteration that made `state`."""
        normalized = Norm(self.config.norm, name="norm")(state).astype(jnp.float32)
        odds_against = max(self.config.recurrence.mean_steps - 1, 1)
        bias_init = nn.initializers.constant(-math.log(odds_against))
        weight = vector(self, "weight", nn.initializers.zeros, (state.shape[-1],))
        bias = vector(self, "bias", bias_init, ())
        return jnp.einsum("btd,d->bt", normalized, weight) + bias


def log_stop(gate_logits: Float[Array, "*n"]) -> Float[Array, "*n"]:
    """log lambda, the log-probability of stopping now given that the token is still there."""
    return jax.nn.log_sigmoid(gate_logits)


def log_continue(gate_logits: Float[Array, "*n"]) -> Float[Array, "*n"]:
    """log (1 - lambda)."""
    return jax.nn.log_sigmoid(-gate_logits)
