"""A reasoning task's symbols as a tokenizer, so that problems can be typed as prompts."""

import dataclasses
import functools
import re
from collections.abc import Sequence

from megatransformer_jax.config.option import UserError
from megatransformer_jax.data.reasoning.tasks import BOS, PAD, Task

_END = "</s>"


@dataclasses.dataclass(frozen=True)
class SymbolTokenizer:
    """One id per symbol: '7 1 + 5 0 =' or '71+50='.

    Blanks between symbols mean nothing; `decode` writes one between each two.
    """

    symbols: tuple[str, ...]

    @classmethod
    def of_task(cls, task: Task) -> "SymbolTokenizer":
        """The symbols of a task."""
        return cls(task.symbols)

    @property
    def vocab_size(self) -> int:
        """Number of symbols."""
        return len(self.symbols)

    @property
    def pad_id(self) -> int:
        """The padding symbol."""
        return PAD

    @property
    def bos_id(self) -> int:
        """The start symbol."""
        return BOS

    @property
    def eos_id(self) -> int:
        """The end symbol; of tasks whose answers have none, padding, which no answer contains."""
        return self.symbols.index(_END) if _END in self.symbols else PAD

    def encode(self, text: str) -> list[int]:
        """Ids of the symbols.

        Raises:
          UserError: naming the first thing that is not a symbol, and the symbols.
        """
        ids = []
        position = 0
        while position < len(text):
            match = self._pattern.match(text, position)
            if match is None:
                known = " ".join(self.symbols[token] for token in self._content_ids)
                shown = known if len(known) <= 60 else f"{known[:60]} ..."
                raise UserError(
                    f"{text[position : position + 10]!r} in {text!r} is not a symbol of the task; "
                    f"its symbols are: {shown}."
                )
            if match[1] is not None:
                ids.append(self.symbols.index(match[1]))
            position = match.end()
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Symbols separated by spaces; padding, start and end are left out."""
        content = set(self._content_ids)
        return " ".join(self.symbols[int(token)] for token in ids if int(token) in content)

    def digest(self) -> str:
        """The symbols themselves."""
        return " ".join(self.symbols)

    def piece_bytes(self, token: int) -> bytes:
        """A space and the symbol, as it stands inside a text; special symbols add nothing."""
        is_content = int(token) in self._content_ids
        return f" {self.symbols[int(token)]}".encode() if is_content else b""

    @property
    def _content_ids(self) -> list[int]:
        special = {self.pad_id, self.bos_id, self.eos_id}
        return [token for token in range(self.vocab_size) if token not in special]

    @functools.cached_property
    def _pattern(self) -> re.Pattern[str]:
        content = [self.symbols[token] for token in self._content_ids]
        longest_first = sorted(content, key=len, reverse=True)
        return re.compile(rf"\s+|({'|'.join(map(re.escape, longest_first))})")
