"""What stands around the core's block: adapters that inject the prelude's output, the exit gate.

An adapter splits into `prepare`, which depends on the injected embedding alone and runs once before
the loop, and `__call__`, which runs in every iteration.
"""

import math
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from megatransformer_jax.config.model import ModelConfig
from megatransformer_jax.nn.loop_parameters import mean_stream
from megatransformer_jax.nn.norms import Norm
from megatransformer_jax.nn.parameters import WeightInit, matrix, vector
from megatransformer_jax.nn.quantized import multiply, record_input
from megatransformer_jax.types import DTypePolicy

# ------------------------------------------------------------------------------
# Adapters.

# exp(-dt A) at initialisation: the square root of 1/5, which keeps the variance of a state under
# repeated decay and unit input near what Parcae (arXiv 2604.12946) starts from.
INITIAL_DECAY = math.sqrt(1 / 5)


@runtime_checkable
class Adapter(Protocol):
    """What the recurrent core needs of an adapter."""

    def prepare(self, embedding: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """The part of the injection that is the same in every iteration."""
        ...

    def __call__(
        self, state: Float[Array, "B T D"], prepared: Float[Array, "B T D"]
    ) -> Float[Array, "B T D"]:
        """The core's input: state with the injection."""
        ...


class LinearAdapter(nn.Module):
    """W [s; e], as Huginn. W is two matrices, so that W_e e is computed once for all iterations."""

    width: int
    inits: WeightInit
    policy: DTypePolicy

    def setup(self) -> None:
        """Declares both halves of W."""
        shape, axes = (self.width, self.width), ("embed", "core_out")
        init = self.inits.input
        self.state_kernel = matrix(self, "state_kernel", init, shape, axes, self.policy)
        self.embedding_kernel = matrix(self, "embedding_kernel", init, shape, axes, self.policy)

    def prepare(self, embedding: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """W_e e."""
        record_input(self, "embedding_kernel", embedding)
        return multiply(embedding, self.embedding_kernel)

    def __call__(
        self, state: Float[Array, "B T D"], prepared: Float[Array, "B T D"]
    ) -> Float[Array, "B T D"]:
        """W_s s + W_e e."""
        record_input(self, "state_kernel", state)
        return multiply(state, self.state_kernel) + prepared


class SumAdapter(nn.Module):
    """s + e."""

    def prepare(self, embedding: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """The embedding unchanged."""
        return embedding

    def __call__(
        self, state: Float[Array, "B T D"], prepared: Float[Array, "B T D"]
    ) -> Float[Array, "B T D"]:
        """Adds."""
        return state + prepared


class GateAdapter(nn.Module):
    """s * e, multiplicative."""

    def prepare(self, embedding: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """The embedding unchanged."""
        return embedding

    def __call__(
        self, state: Float[Array, "B T D"], prepared: Float[Array, "B T D"]
    ) -> Float[Array, "B T D"]:
        """Multiplies channel by channel."""
        return state * prepared


class DiagonalAdapter(nn.Module):
    """exp(-dt A) s + dt B e with A = exp(a_log), dt = softplus(dt_bias): Parcae, arXiv 2604.12946.

    The decay is in (0, 1) for any value of the parameters, so the linear part of the recurrence
    cannot grow. B starts as the identity. None of the three has weight decay. With
    `zero_order_hold` the input's factor is the exact (1 - exp(-dt A)) / A in place of dt.
    """

    width: int
    zero_order_hold: bool
    policy: DTypePolicy

    def setup(self) -> None:
        """Declares A, dt and B so that the decay starts at INITIAL_DECAY."""
        shape = (self.width,)
        # softplus(dt_bias) = -log(INITIAL_DECAY) with A = 1.
        dt_bias = math.log(math.expm1(-math.log(INITIAL_DECAY)))
        self.a_log = vector(self, "a_log", nn.initializers.zeros, shape)
        self.dt_bias = vector(self, "dt_bias", nn.initializers.constant(dt_bias), shape)
        square, axes = (self.width, self.width), ("embed", "core_out")
        self.b_matrix = matrix(self, "b_matrix", identity, square, axes, self.policy)

    def prepare(self, embedding: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """The input dt B e, or its exact form."""
        gain = diagonal_gain(self.a_log, self.dt_bias, self.zero_order_hold)
        record_input(self, "b_matrix", embedding)
        return multiply(embedding, self.b_matrix) * gain.astype(embedding.dtype)

    def __call__(
        self, state: Float[Array, "B T D"], prepared: Float[Array, "B T D"]
    ) -> Float[Array, "B T D"]:
        """Decays the state and adds the input."""
        decay = jnp.exp(-jax.nn.softplus(self.dt_bias) * jnp.exp(self.a_log))
        return decay.astype(state.dtype) * state + prepared


class NoAdapter(nn.Module):
    """s: nothing is injected, so the input reaches the core through the first state alone."""

    def prepare(self, embedding: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """The embedding unchanged; no iteration reads it."""
        return embedding

    def __call__(
        self, state: Float[Array, "B T D"], prepared: Float[Array, "B T D"]
    ) -> Float[Array, "B T D"]:
        """The state."""
        del prepared
        return state


def diagonal_gain(
    a_log: Float[Array, "D"], dt_bias: Float[Array, "D"], zero_order_hold: bool
) -> Float[Array, "D"]:
    """The factor of B e in `DiagonalAdapter`: dt, or (1 - exp(-dt A)) / A."""
    rate, dt = jnp.exp(a_log), jax.nn.softplus(dt_bias)
    return -jnp.expm1(-dt * rate) / rate if zero_order_hold else dt


def build_adapter(
    config: ModelConfig, init: WeightInit, policy: DTypePolicy, name: str | None = None
) -> Adapter:
    """The adapter that `recurrence.adapter` names.

    Raises:
      ValueError: for an unknown name; lists the known ones.
    """
    width = config.core_width
    match config.recurrence.adapter:
        case "linear":
            return LinearAdapter(width, init, policy, name=name)
        case "sum":
            return SumAdapter(name=name)
        case "gate":
            return GateAdapter(name=name)
        case "diagonal":
            hold = config.recurrence.zero_order_hold
            return DiagonalAdapter(width, hold, policy, name=name)
        case "none":
            return NoAdapter(name=name)
    raise ValueError(
        f"unknown adapter {config.recurrence.adapter!r}; known: linear, sum, gate, diagonal, none"
    )


def identity(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
    """Initialiser: ones on the diagonal. `key` is not needed."""
    del key
    rows, columns = shape
    return jnp.eye(rows, columns, dtype=dtype)


# ------------------------------------------------------------------------------
# The exit gate: how likely is it that a token should stop iterating here?


class ExitGate(nn.Module):
    """The gate of PonderNet (arXiv 2107.05407): sigmoid(w . norm(state) + b).

    With `exit_gate.norm=False` it reads the state as it is. w starts at 0 and b such that every
    iteration stops with probability 1 / mean_steps, so that the mean depth begins near that of
    training.
    """

    config: ModelConfig

    @nn.compact
    def __call__(self, state: Float[Array, "B T W"]) -> Float[Array, "B T"]:
        """Logits, float32, of stopping after the iteration that made `state`."""
        state = mean_stream(state, self.config.recurrence.hyper_connections)
        if self.config.exit_gate.norm:
            state = Norm(self.config.norm, name="norm")(state)
        odds_against = max(self.config.recurrence.mean_steps - 1, 1)
        bias_init = nn.initializers.constant(-math.log(odds_against))
        weight = vector(self, "weight", nn.initializers.zeros, (state.shape[-1],))
        bias = vector(self, "bias", bias_init, ())
        return jnp.einsum("btd,d->bt", state.astype(jnp.float32), weight) + bias


def log_stop(gate_logits: Float[Array, "*n"]) -> Float[Array, "*n"]:
    """log lambda, the log-probability of stopping now given that the token is still there."""
    return jax.nn.log_sigmoid(gate_logits)


def log_continue(gate_logits: Float[Array, "*n"]) -> Float[Array, "*n"]:
    """log (1 - lambda)."""
    return jax.nn.log_sigmoid(-gate_logits)
