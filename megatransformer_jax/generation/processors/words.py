"""Processors about words: those that every text contains, and those that none may."""

import dataclasses
from collections.abc import Sequence

import flax
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from megatransformer_jax.generation.endings import TextAutomaton
from megatransformer_jax.generation.history import NO_TOKEN, History
from megatransformer_jax.generation.processors.processor import BANNED, Number

# ------------------------------------------------------------------------------
# Words that every generated text contains.


@flax.struct.dataclass
class ForcedWords:
    """Sees to it that each word is among the generated tokens; leaves the model free until it must.

    The end token is banned as long as a word is missing. Once no more new tokens remain than the
    missing words take, they are written, one begun by the model first. That overrides every
    earlier processor: a token that must come is the only one left, whatever was banned. A word has
    one or more spellings; any of them counts, the first is what is written. The state says which
    words have been found.

    Attributes:
      spellings: int32 [W, A, L] or [B, W, A, L], the ids of each of a word's A spellings, aligned
        to the left, NO_TOKEN behind them. A word without any spelling is off.
      max_new_tokens: int32 [] or [B], tokens that will be generated, the end token included.
      eos_id: int32 [], the end token.
    """

    spellings: Number
    max_new_tokens: Number
    eos_id: Number

    def init(self, history: History) -> Bool[Array, "B W"]:
        """The words among the tokens that the history has generated already."""
        is_off = ~jnp.any(self.spellings[..., 0] != NO_TOKEN, axis=-1)
        found = jnp.broadcast_to(is_off, (history.tokens.shape[0], self.spellings.shape[-3]))

        def look_at(count: Int[Array, ""], found: Bool[Array, "B W"]) -> Bool[Array, "B W"]:
            lengths = jnp.minimum(history.prompt_lengths + count, history.lengths)
            return found | self._just_written(dataclasses.replace(history, lengths=lengths))

        return jax.lax.fori_loop(1, jnp.max(history.num_generated) + 1, look_at, found)

    def __call__(
        self, state: Bool[Array, "B W"], history: History, logits: Float[Array, "B V"]
    ) -> Float[Array, "B V"]:
        """The scores, of one token only where a word must be written."""
        is_missing = ~state
        written = self.spellings[..., 0, :]
        num_needed = jnp.sum(jnp.where(is_missing, _sizes(written), 0), axis=-1)
        num_left = self.max_new_tokens - history.num_generated
        # Whatever is drawn now, what is needed grows no more; so one token above it is free.
        must_write = (num_left <= num_needed) & jnp.any(is_missing, axis=-1)
        next_token = self._next_token(is_missing, history)

        ids = jnp.arange(logits.shape[1])
        is_banned = (ids == self.eos_id) & jnp.any(is_missing, axis=-1, keepdims=True)
        only_next = jnp.where(ids == next_token[:, None], 0.0, BANNED)
        return jnp.where(must_write[:, None], only_next, jnp.where(is_banned, BANNED, logits))

    def update(
        self, state: Bool[Array, "B W"], history: History, tokens: Int[Array, "B"]
    ) -> Bool[Array, "B W"]:
        """The words found, one that just ended included."""
        return state | self._just_written(history)

    def _just_written(self, history: History) -> Bool[Array, "B W"]:
        """Whether a spelling of each word stands at the end of the generated tokens."""
        sizes = _sizes(self.spellings)
        ends = jnp.zeros((), bool)
        for size in range(1, self.spellings.shape[-1] + 1):
            recent = history.suffix(size, of_generated=True)[:, None, None]
            is_same = jnp.all(self.spellings[..., :size] == recent, axis=-1)
            ends = ends | (is_same & (sizes == size))
        return jnp.any(ends, axis=-1)

    def _next_token(self, is_missing: Bool[Array, "B W"], history: History) -> Int[Array, "B"]:
        """The token that goes on with the missing word of which most is written already."""
        written = self.spellings[..., 0, :]  # [W, L] or [B, W, L]
        progress = jnp.where(is_missing, 0, NO_TOKEN)
        for size in range(1, written.shape[-1]):
            recent = history.suffix(size, of_generated=True)[:, None]
            is_same = jnp.all(written[..., :size] == recent, axis=-1)
            progress = jnp.where(is_missing & is_same, size, progress)
        rows = jnp.arange(progress.shape[0])
        word = jnp.argmax(progress, axis=-1)
        written = jnp.broadcast_to(written, (*progress.shape, written.shape[-1]))
        return written[rows, word, progress[rows, word]]


def _sizes(spellings: Int[Array, "*words L"]) -> Int[Array, "*words"]:
    return jnp.sum(spellings != NO_TOKEN, axis=-1)


def forced_words(
    words: Sequence[Sequence[Sequence[int]]], max_new_tokens: int, eos_id: int
) -> ForcedWords:
    """Forces the same words in all rows.

    Args:
      words: the spellings of each word, the one to write first, as token ids.
      max_new_tokens: see `ForcedWords`.
      eos_id: the end token.

    Raises:
      ValueError: if there is no word, one has no spelling or an empty one, or the words take more
        than `max_new_tokens` tokens.
    """
    if not words or not all(word and all(map(len, word)) for word in words):
        raise ValueError(f"{words!r} to be forced; give at least one word and no empty one.")
    num_needed = sum(len(word[0]) for word in words)
    if num_needed > max_new_tokens:
        raise ValueError(
            f"the words take {num_needed} tokens, more than max_new_tokens={max_new_tokens}; raise "
            "that or drop words."
        )
    num_spellings = max(map(len, words))
    longest = max(len(spelling) for word in words for spelling in word)
    table = np.full((len(words), num_spellings, longest), NO_TOKEN, np.int32)
    for row, word in enumerate(words):
        for column, spelling in enumerate(word):
            table[row, column, : len(spelling)] = spelling
    return ForcedWords(jnp.asarray(table), jnp.int32(max_new_tokens), jnp.int32(eos_id))


# ------------------------------------------------------------------------------
# Bans texts, in whatever tokens they would be written.


@flax.struct.dataclass
class BannedTexts:
    """Bans every token that would complete one of the texts, inside it or at its end.

    A text may begin in the prompt. It is banned inside longer words too; to ban a word of its own
    only, give it with a space before it. The state is the automaton's.

    Attributes:
      automaton: finds the texts.
    """

    automaton: TextAutomaton

    def init(self, history: History) -> Int[Array, "B"]:
        """How much of a text stands at the end of each row."""
        state = self.automaton.init(history.tokens.shape[0])
        return self.automaton.read(state, history.tokens, history.lengths)

    def __call__(
        self, state: Int[Array, "B"], history: History, logits: Float[Array, "B V"]
    ) -> Float[Array, "B V"]:
        """The scores with the completing tokens banned."""
        return jnp.where(self.automaton.completing(state), BANNED, logits)

    def update(
        self, state: Int[Array, "B"], history: History, tokens: Int[Array, "B"]
    ) -> Int[Array, "B"]:
        """One token more."""
        return self.automaton.update(state, tokens)[0]
