"""A text as it comes: how many tokens a call of the device makes, and which of them can be shown.

A call for every token costs a dispatch, a copy to the host and, on TPU, whatever a call moves
besides its tokens. So calls grow until one takes as long as nobody notices. The device already
works at the next one while the tokens of the last are shown.
"""

import time
from collections.abc import Callable, Iterator, Sequence

import jax

from megatransformer_jax.config.option import MAX_COUNT, as_whole
from megatransformer_jax.data.tokenizer import Tokenizer
from megatransformer_jax.generation.request import GeneratedMedium, StreamedToken, TextStream

# A call grows until it takes this long: new text 20 times a second looks continuous.
CALL_SECONDS = 0.05
# What is left of a call's own costs in one of so many tokens does not matter.
MAX_TOKENS_PER_CALL = 64


class Pace:
    """How many tokens the next call makes.

    Args:
      tokens_per_call: always so many. None: one in the first call, then as many as are made in
        `CALL_SECONDS`, at most twice as many as in the call before. Of processes that share a mesh
        each must make the same calls, so there None is one.

    Attributes:
      count: tokens of the next call.

    Raises:
      ConfigError: if the number is not a whole one from 1 on.
    """

    def __init__(self, tokens_per_call: int | None):
        self._adapts = tokens_per_call is None and jax.process_count() == 1
        self.count = 1
        if tokens_per_call is not None:
            self.count = as_whole("tokens_per_call", tokens_per_call, 1, MAX_COUNT)
        self._began: float | None = None

    def begin(self) -> int:
        """A call begins; returns how many tokens it is to make."""
        self._began = time.monotonic()
        return self.count

    def end(self) -> None:
        """Its tokens are here. If they were not asked for at once, the call seems to take longer,
        and the next one makes fewer: who reads slowly misses nothing."""
        if self._began is not None and self._adapts:
            self.count = next_count(self.count, time.monotonic() - self._began)
        self._began = None


def next_count(count: int, seconds: float) -> int:
    """Tokens of the next call, after one of `count` tokens that took so long.

    Raises:
      ValueError: if count is not positive.
    """
    if count < 1:
        raise ValueError(f"count is {count}; it must be at least 1.")
    most = min(2 * count, MAX_TOKENS_PER_CALL)
    return most if seconds <= 0 else max(1, min(most, int(count * CALL_SECONDS / seconds)))


class TokenStream:
    """Hands out the tokens of one text, each once, with what it adds to the text.

    A token waits for the next one only if some of its text does: part of a character, or what may
    become a stop text. Should it be the last, it brings that along.

    Args:
      tokenizer: of the model. None: tokens have no text.
      prompt_ids: what is continued.
      stops: stop texts.
      opens: whether a medium follows a token.
    """

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        prompt_ids: Sequence[int],
        stops: Sequence[str],
        opens: Callable[[int], object],
    ):
        self._text = None if tokenizer is None else TextStream(tokenizer, prompt_ids, stops)
        self._opens, self._is_open = opens, bool(opens(prompt_ids[-1]))
        self._num_taken, self._num_media = 0, 0
        self._waiting: StreamedToken | None = None

    def take(
        self,
        tokens: Sequence[int],
        depths: Sequence[int],
        media: Sequence[GeneratedMedium],
        *,
        is_over: bool,
    ) -> Iterator[StreamedToken]:
        """What can be shown now.

        Args:
          tokens: all new ones of the text so far, without an end token.
          depths: of each.
          media: made so far.
          is_over: no other token will come.
        """
        for index in range(self._num_taken, len(tokens)):
            if self._waiting is not None:
                yield self._waiting
            self._waiting = self._next(tokens[index], depths[index], media)
            if self._text is None or not self._text.holds_back:
                yield self._waiting
                self._waiting = None
        self._num_taken = len(tokens)
        if is_over and self._waiting is not None and self._text is not None:
            last = self._waiting
            rest = self._text.end_text()
            yield StreamedToken(last.text + rest, last.token_id, last.depth, last.medium)

    def _next(self, token: int, depth: int, media: Sequence[GeneratedMedium]) -> StreamedToken:
        medium = None
        if self._is_open:
            medium = media[self._num_media]
            self._num_media += 1
        self._is_open = bool(self._opens(token))
        text = "" if self._text is None else self._text.add(token, False)
        return StreamedToken(text, token, depth, medium)
