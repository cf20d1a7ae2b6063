"""When a row's generation ends, and why."""

from typing import Any

import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Int

from megatransformer_jax.generation.text_automaton import TextAutomaton

# Codes in the loop; FINISH_REASONS has their names at the same places.
RUNNING, END_OF_TEXT, STOP, LENGTH, EXHAUSTED = range(5)
FINISH_REASONS = ("running", "end_of_text", "stop", "length", "exhausted")


@struct.dataclass
class EndState:
    """What the loop carries.

    Attributes:
      reason: RUNNING, or why the row has ended.
      stop_state: of the stop automaton; () without stops.
    """

    reason: Any  # int32 [B]
    stop_state: Any

    @property
    def is_running(self) -> Bool[Array, "B"]:
        """Rows that go on."""
        return self.reason == RUNNING


@struct.dataclass
class Ending:
    """What ends a row: an end token, a stop text, or its number of new tokens.

    Attributes:
      end_ids: int32 [E], tokens that end a text; E may be 0.
      max_new_tokens: int32, for all ([]) or per row ([B]).
      stops: finds stop texts across tokens; None without any.
    """

    end_ids: Any
    max_new_tokens: Any
    stops: TextAutomaton | None = None

    def init(self, batch_size: int) -> EndState:
        """All rows are running."""
        stop_state = () if self.stops is None else self.stops.init(batch_size)
        return EndState(jnp.zeros((batch_size,), jnp.int32), stop_state)

    def update(
        self, state: EndState, tokens: Int[Array, "B"], num_generated: Int[Array, "B"]
    ) -> EndState:
        """The state after each running row got a token.

        Args:
          state: before.
          tokens: the new ones; those of rows that have ended do not matter.
          num_generated: tokens behind each prompt, these included.
        """
        reason = jnp.where(num_generated >= self.max_new_tokens, LENGTH, RUNNING)
        stop_state = state.stop_state
        if self.stops is not None:
            stop_state, is_stopped = self.stops.update(stop_state, tokens)
            reason = jnp.where(is_stopped, STOP, reason)
        is_end = jnp.any(tokens[:, None] == self.end_ids, axis=1)
        reason = jnp.where(is_end, END_OF_TEXT, reason)
        return EndState(jnp.where(state.is_running, reason, state.reason), stop_state)


def exhaust(state: EndState, is_exhausted: Bool[Array, "B"]) -> EndState:
    """Ends running rows in which every token is banned."""
    ends = state.is_running & is_exhausted
    return EndState(jnp.where(ends, EXHAUSTED, state.reason), state.stop_state)
