"""Which cached rows of one text another may copy instead of reading its own prompt: no JAX."""

import dataclasses
from collections.abc import Collection, Hashable, Sequence

import numpy as np

from megatransformer_jax.generation.continuous.lanes import RowText


@dataclasses.dataclass(frozen=True)
class Found:
    """Cached tokens that can be copied.

    Attributes:
      row: where they are, or will be once that row has read its prompt.
      num_tokens: of the beginning.
      is_most: whether they are most of what the row has, so that little is lost with it.
    """

    row: int
    num_tokens: int
    is_most: bool


def reading_rule(text: RowText, *, draws_states: bool) -> Hashable | None:
    """What two texts must share so that one may read the other's cached prompt.

    Args:
      text: one of them.
      draws_states: whether the core's first states are drawn, so depend on the prompt's key.

    Returns:
      None: its prompt is for itself alone, because with `warm_start` a token's first state is that
      of the token before, which is not cached.
    """
    if text.warm_start:
        return None
    keys = (text.seed, text.prompt_number) if draws_states else ()
    return (text.depth, text.min_depth, text.criterion, text.threshold, *keys)


class Prefixes:
    """What each row of the cache holds, while its text is there and until another comes.

    Args:
      rows: of the batch.
      chunk: prompt tokens per pass; what saves no pass is not worth a copy.

    Attributes:
      chunk: the same.
    """

    def __init__(self, rows: int, chunk: int):
        self.chunk = chunk
        self._held: list[_Held | None] = [None] * rows

    def place(self, row: int, ids: Sequence[int], rule: Hashable | None) -> None:
        """A text comes into a row. Its prompt but for the last token will be cached."""
        self._held[row] = _Held(list(ids), len(ids), rule)

    def add(self, row: int, token: int) -> None:
        """The row's text got a token, so that the one before it is cached."""
        held = self._held[row]
        assert held is not None
        held.ids.append(token)

    def cut(self, row: int, num_tokens: int) -> None:
        """Only so many tokens of the row's prompt have been read, and no more will be."""
        held = self._held[row]
        assert held is not None
        del held.ids[num_tokens + 1 :]

    def find(
        self,
        ids: Sequence[int],
        rule: Hashable | None,
        *,
        only: Collection[int] | None = None,
        of_prompts: bool = False,
        multiple: int = 1,
    ) -> Found | None:
        """The row whose text begins most alike; of equals the one that came first.

        Args:
          ids: of the prompt that is to be read.
          rule: of its text.
          only: rows that come into question. None: all.
          of_prompts: only what others have read as prompts, not what they generated.
          multiple: of which the number of tokens must be one, unless nothing is left to read.

        Returns:
          None if no row saves a pass.
        """
        best: Found | None = None
        own = np.asarray(ids[:-1], np.int64)
        for row, held in enumerate(self._held):
            if held is None or rule is None or held.rule != rule:
                continue
            if only is not None and row not in only:
                continue
            # The last token of a text is not cached.
            num_held = min(held.num_prompt, len(held.ids)) if of_prompts else len(held.ids)
            common = _common(own, held.ids[: num_held - 1])
            if common < len(own):
                common -= common % multiple
            if (best is None or common > best.num_tokens) and self._saves(len(own), common):
                best = Found(row, common, is_most=2 * common >= len(held.ids))
        return best

    def _saves(self, num_tokens: int, num_copied: int) -> bool:
        return -(-(num_tokens - num_copied) // self.chunk) < -(-num_tokens // self.chunk)


@dataclasses.dataclass
class _Held:
    ids: list[int]
    num_prompt: int
    rule: Hashable | None


def _common(own: np.ndarray, held: Sequence[int]) -> int:
    """Tokens at the beginning that are the same."""
    size = min(len(own), len(held))
    differs = own[:size] != np.asarray(held[:size], np.int64)
    return int(np.argmax(differs)) if differs.any() else size
