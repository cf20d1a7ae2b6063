"""The word problem of the symmetric group: running products of permutations.

For degree 5 and above it is complete for NC1 (Barrington 1989), which a transformer of fixed depth
is believed not to solve for every length (Merrill et al. 2024, arXiv 2404.08819).
"""

import dataclasses
import functools
import itertools

import numpy as np

from megatransformer_jax.data.reasoning.task import Problem, Task, aligned_problem

FIRST_ELEMENT = 2


@dataclasses.dataclass(frozen=True)
class Permutation(Task):
    """Tokens are all elements of S_degree; under each is the product of those so far.

    The first factor acts first: the product of g1, g2 maps x to g2(g1(x)). Elements are written
    by their images, so `021` sends 0 to 0, 1 to 2 and 2 to 1. Length: factors.
    """

    degree: int = 5

    @property
    def symbols(self) -> tuple[str, ...]:
        """Padding, start and the elements in lexicographic order of their images."""
        return ("<pad>", "<s>", *("".join(map(str, image)) for image in _elements(self.degree)))

    def row_length(self, length: int) -> int:
        """The start token and the factors."""
        return 1 + length

    def generate(self, rng: np.random.Generator, length: int) -> Problem:
        """Uniform factors."""
        table = _products(self.degree)
        factors = rng.integers(0, len(table), length)
        running = list(
            itertools.accumulate(factors.tolist(), lambda left, right: table[left][right])
        )
        return aligned_problem(FIRST_ELEMENT + factors, FIRST_ELEMENT + np.array(running))


@functools.cache
def _elements(degree: int) -> tuple[tuple[int, ...], ...]:
    return tuple(itertools.permutations(range(degree)))


@functools.cache
def _products(degree: int) -> list[list[int]]:
    """Entry [g][h] is the index of "g, then h"."""
    elements = _elements(degree)
    index = {image: number for number, image in enumerate(elements)}
    return [
        [index[tuple(second[value] for value in first)] for second in elements]
        for first in elements
    ]
