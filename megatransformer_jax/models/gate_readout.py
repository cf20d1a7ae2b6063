"""What coda and head read of a pass that makes all of its iterations: Ouro's two ways.

An exit gate gives each token a distribution over iterations, p_i = lambda_i (1 - lambda_1) ...
(1 - lambda_{i-1}), and the last of n iterations takes what is left. Ouro (arXiv 2510.25741) reads
its output from it in two ways, which `GenerationConfig` calls `gate_readout`:

| gate_readout | coda and head read                                                          |
|--------------|-----------------------------------------------------------------------------|
| last         | s_n, the last state; the gate is not asked                                  |
| threshold    | s_i, where i is the first iteration with p_1 + ... + p_i >= `gate_threshold` |
| weighted     | p_1 s_1 + ... + p_n s_n                                                     |

Both make all n iterations of every token, so keys and values are those of a fixed depth and a
result does not depend on how tokens share passes. They save no time; the exit criterion
`learned_gate` does, by ending a token's iterations. `weighted` averages states. Ouro averages
logits, which is the same for a model like Ouro's, without a coda and with a head that is linear in
the state (`head_norm=False`).
"""

from typing import Any

import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float

from megatransformer_jax.nn.adapters import log_continue


@struct.dataclass
class GateReadout:
    """One of the two ways; None in its place stands for 'last'.

    Attributes:
      threshold: cumulative exit probability of kind 'threshold'.
      kind: 'threshold' or 'weighted'; static.
    """

    threshold: Float[Array, ""]
    kind: str = struct.field(pytree_node=False)


def make_readout(kind: str, threshold: float) -> GateReadout | None:
    """The read-out that options name; None for 'last'."""
    return None if kind == "last" else GateReadout(jnp.float32(threshold), kind)


@struct.dataclass
class Reading:
    """What was read of the iterations so far.

    Attributes:
      log_survival: log-probability of not having exited yet.
      state: 'weighted': the sum so far, float32. 'threshold': the chosen state, or the latest.
      has_left: 'threshold': whether `state` is chosen.
    """

    log_survival: Float[Array, "B T"]
    state: Float[Array, "B T D"]
    has_left: Bool[Array, "B T"]


def begin_reading(readout: GateReadout | None, state: Float[Array, "B T D"]) -> Reading | None:
    """Before the first iteration, which starts from `state`. None without a read-out."""
    if readout is None:
        return None
    start = jnp.zeros_like(state, jnp.float32) if readout.kind == "weighted" else state
    zeros = jnp.zeros(state.shape[:2], jnp.float32)
    return Reading(zeros, start, jnp.zeros(state.shape[:2], bool))


def read_iteration(
    readout: GateReadout | None,
    reading: Reading,
    state: Float[Array, "B T D"],
    gate: Float[Array, "B T"],
    iterates: Bool[Array, "#B #T"],
) -> Reading:
    """After one more iteration.

    Args:
      readout: which way.
      reading: of the iterations before.
      state: what this one made.
      gate: logits of the exit gate from that state.
      iterates: tokens that took part in this iteration; the others keep their reading.
    """
    assert readout is not None  # Or there would be no reading.
    log_survival = reading.log_survival + log_continue(gate.astype(jnp.float32))
    if readout.kind == "weighted":
        share = jnp.exp(reading.log_survival) - jnp.exp(log_survival)
        read = reading.state + share[..., None] * state.astype(jnp.float32)
        has_left = reading.has_left
    else:
        read = jnp.where(reading.has_left[..., None], reading.state, state)
        has_left = reading.has_left | (1.0 - jnp.exp(log_survival) >= readout.threshold)
    after = (log_survival, read, has_left)
    before = (reading.log_survival, reading.state, reading.has_left)
    return Reading(*(_where(iterates, new, old) for new, old in zip(after, before, strict=True)))


def finish_reading(
    readout: GateReadout | None, reading: Reading | None, state: Float[Array, "B T D"]
) -> Float[Array, "B T D"]:
    """What coda and head read, after the iteration that made the last `state`: that one without a
    read-out."""
    if readout is None or reading is None:
        return state
    if readout.kind == "threshold":
        return reading.state
    # The last iteration takes what is left of the distribution.
    left = jnp.exp(reading.log_survival)[..., None] * state.astype(jnp.float32)
    return (reading.state + left).astype(state.dtype)


def _where(mask: Any, new: Any, old: Any) -> Any:
    return jnp.where(mask.reshape(mask.shape + (1,) * (new.ndim - 2)), new, old)
