"""What generation gives back: finished texts, and tokens as they come."""

import dataclasses
from collections.abc import Sequence

from megatransformer_jax.data.tokenizer import Tokenizer
from megatransformer_jax.generation.stop_strings import cut_at_stop, num_held_back

# What decoders write for bytes that are no character (yet).
_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"


@dataclasses.dataclass(frozen=True)
class Completion:
    """A finished text.

    Attributes:
      prompt: what it continues; None if that was given as ids.
      text: the continuation, without a stop text; empty without a tokenizer.
      token_ids: the new tokens, without an end token; those of a stop text included.
      steps: iterations of the pass that led to each of them; 0 for a model without a core.
      score: sum of the log-probabilities of all new tokens under the model, the end token's
        included; of beam search its penalised score.
      finish_reason: 'end_of_text', 'stop', 'length', or 'exhausted' if every token was banned.
    """

    prompt: str | None
    text: str
    token_ids: tuple[int, ...]
    steps: tuple[int, ...]
    score: float
    finish_reason: str


@dataclasses.dataclass(frozen=True)
class StreamedToken:
    """A token as it comes.

    Attributes:
      text: what it adds to the text; empty while a character, or what may become a stop text, is
        not complete. The last token brings all that was held back.
      token_id: its id.
      steps: iterations of the pass that led to it.
    """

    text: str
    token_id: int
    steps: int


def continuation_text(
    tokenizer: Tokenizer, prompt_ids: Sequence[int], new_ids: Sequence[int]
) -> str:
    """Text of the new tokens behind the prompt's.

    Decoded together, since a token's text can depend on the one before: SentencePiece drops a blank
    at the start.
    """
    prompt = [token for token in prompt_ids if token != tokenizer.bos_id]
    before = tokenizer.decode(prompt)
    after = tokenizer.decode([*prompt, *new_ids])
    # A prompt whose last character was not complete has none to compare with.
    return after[len(before) :] if after.startswith(before) else tokenizer.decode(new_ids)


class TextStream:
    """Turns tokens into text piece by piece.

    Args:
      tokenizer: of the model.
      prompt_ids: what is continued.
      stops: stop texts, which are never shown.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int], stops: Sequence[str]):
        self._tokenizer = tokenizer
        self._prompt_ids = prompt_ids
        self._stops = stops
        self._new_ids: list[int] = []
        self._num_shown = 0

    def add(self, token: int, is_last: bool) -> str:
        """What can be shown once this token has come; all that is left if it is the last."""
        self._new_ids.append(token)
        text = continuation_text(self._tokenizer, self._prompt_ids, self._new_ids)
        text = cut_at_stop(text, self._stops)
        if not is_last:
            text = text.rstrip(_INCOMPLETE)
            text = text[: len(text) - num_held_back(text, self._stops)]
        piece = text[self._num_shown :]
        self._num_shown += len(piece)
        return piece
