"""When a row's generation ends, and why: end tokens, length, and texts found by an automaton.

stops = stop_strings(("\\n\\n", "User:"), piece_table(tokenizer, vocab_size))
state = stops.init(batch_size)
state, is_stopped = stops.update(state, tokens)   # in the loop, after each token
text = cut_at_stop(tokenizer.decode(ids), ("\\n\\n", "User:"))
"""

import collections
import dataclasses
import typing
from collections.abc import Sequence
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Int

from megatransformer_jax.config.option import UserError
from megatransformer_jax.data.hf_tokenizer import HuggingFaceTokenizer
from megatransformer_jax.data.tokenizer import Tokenizer

# ------------------------------------------------------------------------------
# Finds given texts in what is being generated, one table look-up per token.
#
# A text may begin in the middle of one token and end in the middle of another. An automaton over
# bytes (Aho and Corasick 1975) knows how much of a text stands at the end; for each of its states
# and each token, the state behind the token's bytes is computed beforehand.
#
# Text here is what the tokens' bytes make up. For a SentencePiece model with a dummy prefix it has
# a space before the first token that `decode` of the same tokens drops.

# Bounds the table, which has a row per byte of the texts and a column per token.
MAX_TEXT_BYTES = 4096
# Rows are rounded up to a power of two, so that other texts seldom recompile.
MIN_STATES = 16
_REPLACEMENT = "\ufffd"


@dataclasses.dataclass(frozen=True)
class PieceTable:
    """The bytes that each token stands for, on the host.

    Attributes:
      content: uint8 [V, most bytes of a token], zeros behind the token's own.
      sizes: int32 [V], bytes of each token; 0 for special ones.
    """

    content: np.ndarray
    sizes: np.ndarray


def piece_table(tokenizer: Tokenizer, vocab_size: int) -> PieceTable:
    """The bytes of each token of a model whose vocabulary may exceed the tokenizer's."""
    pieces = [tokenizer.piece_bytes(token) for token in range(tokenizer.vocab_size)]
    sizes = np.zeros(vocab_size, np.int32)
    sizes[: len(pieces)] = [len(piece) for piece in pieces]
    content = np.zeros((vocab_size, max(1, sizes.max())), np.uint8)
    for token, piece in enumerate(pieces):
        content[token, : len(piece)] = np.frombuffer(piece, np.uint8)
    return PieceTable(content, sizes)


@flax.struct.dataclass
class TextAutomaton:
    """A pytree; its state is int32 [B], so beams can gather it.

    Attributes:
      transitions: int16 or int32 [states, V]; the state behind a token, or its complement (~) if a
        text ends inside the token or at its end.
      roots: int32 [1] or [B], the state of an empty row.
    """

    # Any because transformations put other things in the arrays' place.
    transitions: typing.Any
    roots: typing.Any

    def init(self, batch_size: int) -> Int[Array, "B"]:
        """The states of empty rows."""
        return jnp.broadcast_to(self.roots, (batch_size,))

    def update(
        self, state: Int[Array, "B"], tokens: Int[Array, "B"]
    ) -> tuple[Int[Array, "B"], Bool[Array, "B"]]:
        """The states behind the tokens, and whether a text ends in each token."""
        entry = self.transitions[state, tokens].astype(jnp.int32)
        return jnp.where(entry < 0, ~entry, entry), entry < 0

    def read(
        self, state: Int[Array, "B"], tokens: Int[Array, "B C"], lengths: Int[Array, "B"]
    ) -> Int[Array, "B"]:
        """The states behind the first `lengths` tokens of each row."""

        def step(column: Int[Array, ""], state: Int[Array, "B"]) -> Int[Array, "B"]:
            return jnp.where(column < lengths, self.update(state, tokens[:, column])[0], state)

        return jax.lax.fori_loop(0, jnp.max(lengths), step, state)

    def completing(self, state: Int[Array, "B"]) -> Bool[Array, "B V"]:
        """The tokens in which a text would end."""
        return self.transitions[state] < 0


def text_automaton(groups: Sequence[Sequence[str]], pieces: PieceTable) -> TextAutomaton:
    """The automaton that finds the texts of a group.

    Args:
      groups: one group of texts for all rows, or one per row. A group may be empty.
      pieces: of the tokenizer.

    Raises:
      UserError: if a text is empty, contains U+FFFD (which stands for bytes that are not text), or
        all together are too long.
    """
    for group in groups:
        _check_texts(group)
    steps = np.zeros((0, 256), np.int32)
    is_end = np.zeros(0, bool)
    root_of: dict[tuple[str, ...], int] = {}
    for group in map(tuple, groups):
        if group not in root_of:
            root_of[group] = len(steps)
            new_steps, new_ends = _byte_automaton([text.encode("utf-8") for text in group])
            steps = np.concatenate([steps, new_steps + len(steps)])
            is_end = np.concatenate([is_end, new_ends])
    _check_size(len(steps))
    roots = jnp.asarray([root_of[tuple(group)] for group in groups], jnp.int32)
    return TextAutomaton(jnp.asarray(_token_transitions(steps, is_end, pieces)), roots)


def _check_texts(texts: Sequence[str]) -> None:
    for text in texts:
        if not text or _REPLACEMENT in text:
            raise UserError(
                f"{text!r} cannot be looked for in generated text; give at least one character, "
                "and not U+FFFD."
            )


def _check_size(num_states: int) -> None:
    if num_states > MAX_TEXT_BYTES:
        raise UserError(
            f"the texts to look for have {num_states} bytes, more than {MAX_TEXT_BYTES}; give "
            "fewer or shorter ones."
        )


def _byte_automaton(texts: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
    """Next state [states, 256] from state 0, and the states in which a text ends."""
    children: list[dict[int, int]] = [{}]
    ends = [False]
    for text in texts:
        node = 0
        for byte in text:
            if byte not in children[node]:
                children[node][byte] = len(children)
                children.append({})
                ends.append(False)
            node = children[node][byte]
        ends[node] = True
    steps = np.zeros((len(children), 256), np.int32)
    # By rising depth: a state that is left goes on from its longest proper suffix, a shorter one.
    queue = collections.deque([(0, 0)])
    while queue:
        node, suffix = queue.popleft()
        ends[node] |= ends[suffix]
        steps[node] = steps[suffix]
        for byte, child in children[node].items():
            queue.append((child, int(steps[suffix, byte]) if node else 0))
            steps[node, byte] = child
    return steps, np.asarray(ends)


def _token_transitions(steps: np.ndarray, is_end: np.ndarray, pieces: PieceTable) -> np.ndarray:
    """The table of `TextAutomaton`, with its rows rounded up."""
    order = np.argsort(-pieces.sizes, kind="stable")
    content, sizes = pieces.content[order], pieces.sizes[order]
    state = np.repeat(np.arange(len(steps), dtype=np.int32)[:, None], len(order), axis=1)
    is_hit = np.zeros(state.shape, bool)
    for place in range(content.shape[1]):
        longer = int(np.sum(sizes > place))  # the tokens that have a byte here come first
        state[:, :longer] = steps[state[:, :longer], content[:longer, place]]
        is_hit[:, :longer] |= is_end[state[:, :longer]]
    num_rows = max(MIN_STATES, 1 << (len(steps) - 1).bit_length())
    table = np.zeros((num_rows, len(order)), np.int16 if num_rows <= 2**15 else np.int32)
    table[: len(steps), order] = np.where(is_hit, ~state, state)
    return table


# ------------------------------------------------------------------------------
# The state of a row's ending.

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


def end_ids_of(tokenizer: Tokenizer | None) -> Sequence[int]:
    """Ids that end a text."""
    if tokenizer is None:
        return ()
    if isinstance(tokenizer, HuggingFaceTokenizer):
        return tokenizer.end_ids
    return (tokenizer.eos_id,)


# ------------------------------------------------------------------------------
# Texts that end the generation: found in the loop by the automaton, cut off on the host.


def stop_strings(stops: Sequence[str], pieces: PieceTable) -> TextAutomaton:
    """The automaton that finds the same stops in all rows.

    For stops that differ between rows use `text_automaton`. Start it with `init` behind the prompt:
    a stop that begins in the prompt is none.

    Raises:
      UserError: see `text_automaton`.
    """
    return text_automaton([stops], pieces)


class StopFinder:
    """Finds the same stops token by token on the host, for one text whose tokens come one by one.

    It needs no table with a column per token, so every text may have its own stop texts.

    Args:
      stops: the texts; none finds nothing.
      tokenizer: of the model.

    Raises:
      UserError: see `text_automaton`.
    """

    def __init__(self, stops: Sequence[str], tokenizer: Tokenizer | None):
        _check_texts(stops)
        if stops and tokenizer is None:
            raise UserError("stop texts need a tokenizer, and this model has none.")
        self._tokenizer = tokenizer if stops else None
        self._steps, self._is_end = _byte_automaton([stop.encode("utf-8") for stop in stops])
        _check_size(len(self._steps))
        self._state = 0

    def add(self, token: int) -> bool:
        """Whether a stop is complete inside this new token or at its end."""
        if self._tokenizer is None:
            return False
        is_found = False
        for byte in self._tokenizer.piece_bytes(token):
            self._state = int(self._steps[self._state, byte])
            is_found |= bool(self._is_end[self._state])
        return is_found

    def reason(self, token: int, reason: int) -> int:
        """Why a text ends with this new token, stops included; RUNNING if it goes on.

        Args:
          token: the new one; without meaning if the reason is EXHAUSTED.
          reason: as the loop gives it, which knows of no stop. As in `Ending`, an end token comes
            before a stop, and a stop before the length.
        """
        if reason in (END_OF_TEXT, EXHAUSTED):
            return reason
        return STOP if self.add(token) else reason


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
