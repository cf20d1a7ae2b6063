"""Shows continuations token by token, coloured by the iterations that each token took."""

import codecs
import itertools
from collections.abc import Iterator, Sequence

from rich.console import Console
from rich.text import Text

from megatransformer_jax.data.tokenizer import Tokenizer

# From few iterations to many; the terminal's own colours, so that its theme keeps them readable.
_COLORS = ("blue", "cyan", "green", "yellow", "red")
# What decoders write for bytes that are no character (yet).
_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"


class Screen:
    """Where prompts and continuations are shown.

    Args:
      console: the output. If it is no terminal, or one without colours, text is written as it is.
      depth: most iterations of a token, for the colours; may be set anew between texts. None:
        iterations are not shown.
    """

    def __init__(self, console: Console, depth: int | None):
        self.depth = depth
        self._console = console
        self._has_colors = console.color_system is not None and not console.no_color
        self._waiting: list[int] = []  # Iterations of tokens whose character is not complete.
        self._seen: list[int] = []

    def heading(self, text: str) -> None:
        """A line above one of several texts."""
        self._write(f"--- {text} ---\n", "bold")

    def prompt(self, text: str) -> None:
        """What is continued."""
        self._write(text, "dim")

    def token(self, text: str, steps: int) -> None:
        """The next token's text, which is empty if its character is not complete yet."""
        if self.depth is None:
            self._write(text)
            return
        self._seen.append(steps)
        self._waiting.append(steps)
        if not text:
            return
        if self._has_colors:
            self._write(text, color(max(self._waiting), self.depth))
        else:
            self._write(f"{text}[{','.join(map(str, self._waiting))}]")
        self._waiting = []

    def end(self) -> None:
        """Ends a text."""
        if self._waiting and not self._has_colors:
            self._write(f"[{','.join(map(str, self._waiting))}]")
        self._waiting = []
        self._write("\n")

    def legend(self) -> None:
        """What the colours mean, and the mean since the last legend; nothing without tokens."""
        if self.depth is None or not self._seen:
            return
        self._write("iterations:")
        if self._has_colors:
            for first, last in color_ranges(self.depth):
                words = f" {first}" if first == last else f" {first}-{last}"
                self._write(words, color(first, self.depth))
            self._write(",")
        self._write(f" mean {sum(self._seen) / len(self._seen):.2f} of {self.depth}\n")
        self._seen = []

    def _write(self, text: str, style: str = "") -> None:
        if self._console.is_terminal:
            # A model may write the character that begins commands to the terminal.
            text = text.replace("\x1b", _INCOMPLETE)
        if self._has_colors:
            self._console.print(Text(text, style), end="", soft_wrap=True)
        else:
            self._console.file.write(text)
            self._console.file.flush()


def color(steps: int, depth: int) -> str:
    """The colour of a token that took `steps` of at most `depth` iterations."""
    return _COLORS[min(max(steps - 1, 0) * len(_COLORS) // depth, len(_COLORS) - 1)]


def color_ranges(depth: int) -> Iterator[tuple[int, int]]:
    """First and last number of iterations of each colour that occurs."""
    first = 1
    for steps in range(1, depth + 1):
        if steps == depth or color(steps + 1, depth) != color(steps, depth):
            yield first, steps
            first = steps + 1


def token_texts(tokenizer: Tokenizer, token_ids: Sequence[int], text: str) -> list[str]:
    """The part of `text` that each token adds; the token that completes a character has all of it.

    Args:
      tokenizer: that of the model.
      token_ids: generated tokens.
      text: what they stand for, perhaps without a blank at its start or a stop text at its end.
    """
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    texts = [decoder.decode(tokenizer.piece_bytes(token)) for token in token_ids]
    if texts:
        texts[-1] += decoder.decode(b"", final=True)
    # Where each token's part begins and ends in `text`.
    ends = list(itertools.accumulate(map(len, texts), initial=-max("".join(texts).find(text), 0)))
    return [text[max(begin, 0) : max(end, 0)] for begin, end in itertools.pairwise(ends)]
