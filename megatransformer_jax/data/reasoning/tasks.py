"""Generated tasks that need iterations: parity, addition, hops, permutations, arithmetic."""

import abc
import dataclasses
import functools
import itertools
import string
import typing

import numpy as np

# ------------------------------------------------------------------------------
# What every task has in common.

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
        """Symbols of the ids, separated by spaces."""
        return " ".join(self.symbols[int(token)] for token in ids)


def aligned_problem(inputs: np.ndarray, answers: np.ndarray) -> Problem:
    """A start token, then `inputs`; under each input its answer, which all count in the loss."""
    tokens = np.concatenate(([BOS], inputs)).astype(np.int32)
    targets = np.concatenate(([PAD], answers)).astype(np.int32)
    loss_mask = np.ones(len(tokens), np.float32)
    loss_mask[0] = 0
    return Problem(tokens, targets, loss_mask)


# ------------------------------------------------------------------------------
# Running parity: prefix sums modulo 2, the easiest task with unbounded depth.

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


# ------------------------------------------------------------------------------
# Multi-digit addition, least significant digit first, answered digit by digit.

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


# ------------------------------------------------------------------------------
# k-fold composition of a function given in the prompt (p-hop).

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
        return self._problem(rng, image, length, num_asked=1)

    def _problem(
        self, rng: np.random.Generator, image: np.ndarray, length: int, num_asked: int
    ) -> Problem:
        """`length` hops along x -> image[x] from a uniform start; asks at the last marks."""
        order = rng.permutation(self.num_symbols)
        places = [int(rng.integers(0, self.num_symbols))]
        for _ in range(length):
            places.append(int(image[places[-1]]))
        table = np.stack((order, image[order]), axis=1).reshape(-1)
        tokens = np.concatenate(
            ([BOS], FIRST_SYMBOL + table, [FIRST_SYMBOL + places[0]], np.full(length, HOP))
        ).astype(np.int32)
        targets = np.full(len(tokens), PAD, np.int32)
        targets[-num_asked:] = FIRST_SYMBOL + np.array(places[-num_asked:])
        loss_mask = np.zeros(len(tokens), np.float32)
        loss_mask[-num_asked:] = 1
        return Problem(tokens, targets, loss_mask)


@dataclasses.dataclass(frozen=True)
class Pointers(Hop):
    """`<s> b c a b c a a > >` follows the cycle a -> b -> c -> a: under the marks are b and c.

    Differs from `Hop` in two ways. The function is a single cycle through all symbols, because the
    orbits of a random one are short, so that a few hops often end where many would. And each hop
    is asked for, at its own mark, so that a long problem has short ones in it to learn from.
    Length: hops.
    """

    def generate(self, rng: np.random.Generator, length: int) -> Problem:
        """A uniform random cycle, a uniform start, `length` hops."""
        cycle = rng.permutation(self.num_symbols)
        image = np.empty_like(cycle)
        image[cycle] = np.roll(cycle, -1)
        return self._problem(rng, image, length, num_asked=length)


# ------------------------------------------------------------------------------
# The word problem of the symmetric group: running products of permutations.
#
# For degree 5 and above it is complete for NC1 (Barrington 1989), which a transformer of fixed
# depth is believed not to solve for every length (Merrill et al. 2024, arXiv 2404.08819).

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


# ------------------------------------------------------------------------------
# Modular arithmetic in prefix notation (MANO).
#
# Ouro (Zhu et al. 2025, arXiv 2510.25741) trains it to compare loops with layers at equal
# parameters; the task itself is from Allen-Zhu's "Physics of Language Models: Part 4.1".

FIRST_OPERATION, ASKED, FIRST_RESIDUE = 2, 5, 6
OPERATIONS = "+-*"
NUMERALS = string.digits + string.ascii_lowercase


@dataclasses.dataclass(frozen=True)
class Mano(Task):
    """`<s> - * 3 + 4 1 2 =` is 3 * (4 + 1) - 2; modulo 7 the answer is 6. Length: operations.

    All expressions with the same number of operations are equally likely. A residue is one token,
    written as one digit of base 36 (10 is `a`), so that prompts need no spaces. The answer is one
    token as well, asked at `=` only: every intermediate result must be worked out inside the model.
    """

    modulus: int = 23

    @property
    def symbols(self) -> tuple[str, ...]:
        """Padding, start, the operations, the equals sign and the residues."""
        return ("<pad>", "<s>", *OPERATIONS, "=", *NUMERALS[: self.modulus])

    def row_length(self, length: int) -> int:
        """Start, operations, one operand more, and the equals sign."""
        return 2 * length + 3

    def generate(self, rng: np.random.Generator, length: int) -> Problem:
        """Uniform operations, operands and shape of the expression."""
        operations = rng.integers(0, len(OPERATIONS), length)
        operands = rng.integers(0, self.modulus, length + 1)
        expression = _prefix_form(
            rng.permutation(
                np.concatenate((FIRST_OPERATION + operations, FIRST_RESIDUE + operands))
            )
        )
        tokens = np.concatenate(([BOS], expression, [ASKED])).astype(np.int32)
        targets = np.full(len(tokens), PAD, np.int32)
        targets[-1] = FIRST_RESIDUE + self._value(expression.tolist())
        loss_mask = np.zeros(len(tokens), np.float32)
        loss_mask[-1] = 1
        return Problem(tokens, targets, loss_mask)

    def _value(self, expression: list[int]) -> int:
        """The residue that the prefix expression has, read from its end with a stack."""
        stack: list[int] = []
        for token in reversed(expression):
            if token >= FIRST_RESIDUE:
                stack.append(token - FIRST_RESIDUE)
                continue
            left, right = stack.pop(), stack.pop()
            match OPERATIONS[token - FIRST_OPERATION]:
                case "+":
                    value = left + right
                case "-":
                    value = left - right
                case _:
                    value = left * right
            stack.append(value % self.modulus)
        return stack.pop()


def _prefix_form(shuffled: np.ndarray) -> np.ndarray:
    """The one rotation of n operations and n + 1 operands that is an expression.

    Each operation asks for one operand more and each operand gives one, and only at its very end
    has an expression as many as it needs. Of all rotations exactly one, the one that starts after
    the first lowest point, is like that (cycle lemma). So shuffling makes every shape of
    expression equally likely.
    """
    missing = np.cumsum(np.where(shuffled < FIRST_RESIDUE, 1, -1))
    return np.roll(shuffled, -(int(np.argmin(missing)) + 1))
