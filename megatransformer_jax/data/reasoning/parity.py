"""Running parity: prefix sums modulo 2, the easiest task with unbounded depth."""

import dataclasses

import numpy as np

from megatransformer_jax.data.reasoning.task import Problem, Task, aligned_problem

FIRST_BIT = 2


@dataclasses.dataclass(frozen=True)
class Parity(Task):
    """`<s> 1 0 1 1 => 1 1 0 1`: under each bit the parity of the bits so far. Length: bits."""

    @property
    def symbols(self) -> tuple[str, ...]:
        """Padding, start and the two bits."""
        return ("<pad>", "<s>", "0", "1")

    def row_length(self, length: int) -> int:
        """The start token and the bits."""
        return 1 + length

    def generate(self, rng: np.random.Generator, length: int) -> Problem:
        """Uniform bits."""
        bits = rng.integers(0, 2, length)
        return aligned_problem(FIRST_BIT + bits, FIRST_BIT + np.cumsum(bits) % 2)
