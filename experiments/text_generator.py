"""What `experiments.generate` needs of a generator, so that tests can put a small one in its place.

`megatransformer_jax.generation.generator` has the real one.
"""

from collections.abc import Iterator, Sequence
from typing import Protocol

from experiments.prompts import Prompts


class StreamedToken(Protocol):
    """A token as it comes."""

    @property
    def text(self) -> str:
        """What it adds to the text; empty if a character is not complete yet."""
        ...

    @property
    def token_id(self) -> int:
        """Its id."""
        ...

    @property
    def steps(self) -> int:
        """Iterations it took."""
        ...


class Completion(Protocol):
    """A finished text."""

    @property
    def prompt(self) -> str | None:
        """What it continues; None if that was given as ids."""
        ...

    @property
    def text(self) -> str:
        """The continuation."""
        ...

    @property
    def token_ids(self) -> tuple[int, ...]:
        """The new tokens."""
        ...

    @property
    def steps(self) -> tuple[int, ...]:
        """Iterations of each new token."""
        ...

    @property
    def score(self) -> float:
        """Sum of the log-probabilities."""
        ...

    @property
    def finish_reason(self) -> str:
        """Why it ended."""
        ...


class TextGenerator(Protocol):
    """Continues prompts with one model and one setting."""

    def generate(self, prompts: Prompts) -> Sequence[Completion]:
        """`num_samples` texts per prompt, in the order of the prompts."""
        ...

    def stream(self, prompt: str | Sequence[int]) -> Iterator[StreamedToken]:
        """One text, token by token."""
        ...
