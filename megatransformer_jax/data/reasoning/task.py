"""What every generated task has in common."""

import abc
import typing

import numpy as np

PAD = 0
BOS = 1


class Problem(typing.NamedTuple):
    """One problem as aligned arrays of the same length, without padding.

    `targets[t]` is what position t must say; it is PAD where `loss_mask` is 0. An answer is exact
    when the argmax equals the target at every position whose `loss_mask` is 1. The positions
    before it hold the right answer so far, so this is the same as greedy decoding of the answer.
    """

    tokens: np.ndarray  # int32 [length]
    targets: np.ndarray  # int32 [length]
    loss_mask: np.ndarray  # float32 [length]


class Task(abc.ABC):
    """A family of problems with a vocabulary and a length that sets the difficulty."""

    @property
    @abc.abstractmethod
    def symbols(self) -> tuple[str, ...]:
        """How each token id is printed; the first two are always padding and start."""

    @property
    def vocab_size(self) -> int:
        """Number of token ids, the same for every length."""
        return len(self.symbols)

    @abc.abstractmethod
    def row_length(self, length: int) -> int:
        """Positions that a problem of this length takes."""

    @abc.abstractmethod
    def generate(self, rng: np.random.Generator, length: int) -> Problem:
        """A random problem. It depends on the state of `rng` and on `length` alone."""

    def describe(self, problem: Problem) -> str:
        """The problem and its answer in readable symbols."""
        asked = problem.loss_mask == 1
        return f"{self.decode(problem.tokens)} => {self.decode(problem.targets[asked])}"

    def decode(self, ids: typing.Iterable[int]) -> str:
        """Symbols of the ids, with a blank between them."""
        return " ".join(self.symbols[int(token)] for token in ids)


def aligned_problem(inputs: np.ndarray, answers: np.ndarray) -> Problem:
    """A start token, then `inputs`; under each input its answer, which all count in the loss."""
    tokens = np.concatenate(([BOS], inputs)).astype(np.int32)
    targets = np.concatenate(([PAD], answers)).astype(np.int32)
    loss_mask = np.ones(len(tokens), np.float32)
    loss_mask[0] = 0
    return Problem(tokens, targets, loss_mask)
