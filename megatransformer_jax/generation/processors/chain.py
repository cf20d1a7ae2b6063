"""A chain of logits processors: a tuple, passed through jit as an ordinary argument.

Adding or removing a processor compiles once; changing its numbers compiles nothing. `build.py` puts
the processors in the order in which Hugging Face's `generate` has them.

A chain may ban every token of a row, for example a no-repeat n-gram of one token once all have been
used. The row is then -inf throughout, never NaN, and nothing can be drawn from it; `is_exhausted`
says so and the caller has to end the row.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from megatransformer_jax.generation.history import History
from megatransformer_jax.generation.processors.processor import Processor, State

Chain = tuple[Processor, ...]


def init_chain(chain: Chain, history: History) -> tuple[State, ...]:
    """The states of all processors for a history."""
    return tuple(processor.init(history) for processor in chain)


def apply_chain(
    chain: Chain, states: tuple[State, ...], history: History, logits: Float[Array, "B V"]
) -> Float[Array, "B V"]:
    """The scores after all processors, in float32."""
    logits = logits.astype(jnp.float32)
    for processor, state in zip(chain, states, strict=True):
        logits = processor(state, history, logits)
    return logits


def update_chain(
    chain: Chain, states: tuple[State, ...], history: History, tokens: Int[Array, "B"]
) -> tuple[State, ...]:
    """The states after `tokens` were appended to `history`."""
    return tuple(
        processor.update(state, history, tokens)
        for processor, state in zip(chain, states, strict=True)
    )


def is_exhausted(logits: Float[Array, "B V"]) -> Bool[Array, "B"]:
    """Rows in which every token is banned."""
    return jnp.all(jnp.isneginf(logits), axis=-1)
