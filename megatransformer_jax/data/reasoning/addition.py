"""Multi-digit addition, least significant digit first, answered digit by digit."""

import dataclasses

import numpy as np

from megatransformer_jax.data.reasoning.task import BOS, PAD, Problem, Task

END, PLUS, EQUALS, FIRST_DIGIT = 2, 3, 4, 5


@dataclasses.dataclass(frozen=True)
class Addition(Task):
    """`<s> 7 1 + 5 0 = 2 2 0` is 17 + 05 = 022. Length: digits of each summand.

    The sum always has one digit more, so that its last carry has a place. The answer is predicted
    as the next token from `=` on, and after its last digit the end token.
    """

    @property
    def symbols(self) -> tuple[str, ...]:
        """Padding, start, end, the two signs and the digits."""
        return ("<pad>", "<s>", "</s>", "+", "=", *map(str, range(10)))

    def row_length(self, length: int) -> int:
        """Start, two summands, two signs and the sum; the end token is a target only."""
        return 3 * length + 4

    def generate(self, rng: np.random.Generator, length: int) -> Problem:
        """Uniform digits, leading zeros allowed."""
        summands = rng.integers(0, 10, (2, length))
        total = _add_digits(summands)
        left, right = FIRST_DIGIT + summands
        sequence = np.concatenate(
            ([BOS], left, [PLUS], right, [EQUALS], FIRST_DIGIT + total, [END])
        ).astype(np.int32)
        loss_mask = np.zeros(len(sequence) - 1, np.float32)
        loss_mask[-(length + 2) :] = 1
        targets = np.where(loss_mask == 1, sequence[1:], PAD).astype(np.int32)
        return Problem(sequence[:-1], targets, loss_mask)


def _add_digits(summands: np.ndarray) -> np.ndarray:
    """Digits of the sum, least significant first, one more than each summand has."""
    total = []
    carry = 0
    for column in summands.sum(axis=0).tolist():
        carry, digit = divmod(column + carry, 10)
        total.append(digit)
    return np.array([*total, carry])
