"""Texts that end the generation: found in the loop by an automaton, cut off on the host.

stops = stop_strings(("\n\n", "User:"), piece_table(tokenizer, vocab_size))
state = stops.init(batch_size)
state, is_stopped = stops.update(state, tokens)   # in the loop, after each token
text = cut_at_stop(tokenizer.decode(ids), ("\n\n", "User:"))
"""

from collections.abc import Sequence

from megatransformer_jax.generation.text_automaton import (
    PieceTable,
    TextAutomaton,
    text_automaton,
)


def stop_strings(stops: Sequence[str], pieces: PieceTable) -> TextAutomaton:
    """The automaton that finds the same stops in all rows.

    For stops that differ between rows use `text_automaton`. Start it with `init` behind the prompt:
    a stop that begins in the prompt is none.

    Raises:
      UserError: see `text_automaton`.
    """
    return text_automaton([stops], pieces)


def cut_at_stop(text: str, stops: Sequence[str]) -> str:
    """The text before the stop that is complete first; of several that end there, the longest."""
    found = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
    return text[: min(found)[1]] if found else text


def num_held_back(text: str, stops: Sequence[str]) -> int:
    """Characters at the end that may become a stop, and are not to be shown yet when streaming."""
    return max(
        (size for stop in stops for size in range(1, len(stop)) if text.endswith(stop[:size])),
        default=0,
    )
