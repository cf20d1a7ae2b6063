"""k-fold composition of a function given in the prompt (p-hop)."""

import dataclasses

import numpy as np

from megatransformer_jax.data.reasoning.task import BOS, PAD, Problem, Task

HOP, FIRST_SYMBOL = 2, 3


@dataclasses.dataclass(frozen=True)
class Hop(Task):
    """`<s> b c a b c c a > >` asks for f(f(a)) with f(b)=c, f(a)=b, f(c)=c; the answer is c.

    The pairs (x, f(x)) of a uniform random function come in random order, then the start, then one
    mark per hop: counts in unary can be longer than any trained on, whereas the token of a number
    never seen in training would mean nothing. The answer is asked at the last mark only.
    The composition depth is what looped models are provably good at (arXiv 2502.17416).
    Length: hops.
    """

    num_symbols: int = 5

    @property
    def symbols(self) -> tuple[str, ...]:
        """Padding, start, the hop mark and letters."""
        return (
            "<pad>",
            "<s>",
            ">",
            *(chr(ord("a") + number) for number in range(self.num_symbols)),
        )

    def row_length(self, length: int) -> int:
        """Start token, table, first symbol and hop marks."""
        return 1 + 2 * self.num_symbols + 1 + length

    def generate(self, rng: np.random.Generator, length: int) -> Problem:
        """A uniform random function, a uniform start, `length` hops."""
        image = rng.integers(0, self.num_symbols, self.num_symbols)
        order = rng.permutation(self.num_symbols)
        start = int(rng.integers(0, self.num_symbols))
        table = np.stack((order, image[order]), axis=1).reshape(-1)
        tokens = np.concatenate(
            ([BOS], FIRST_SYMBOL + table, [FIRST_SYMBOL + start], np.full(length, HOP))
        ).astype(np.int32)
        answer = start
        for _ in range(length):
            answer = image[answer]
        targets = np.full(len(tokens), PAD, np.int32)
        targets[-1] = FIRST_SYMBOL + answer
        loss_mask = np.zeros(len(tokens), np.float32)
        loss_mask[-1] = 1
        return Problem(tokens, targets, loss_mask)
