"""Each task against a slow solution written from its definition."""

import collections
import itertools
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatransformer_jax.config.data import REASONING_TASKS, ReasoningConfig
from megatransformer_jax.config.option import ConfigError
from megatransformer_jax.data.reasoning import ProblemSet, build_task

indices = st.integers(0, 10**6 - 1)


def problem_set(task: str, held_out: bool = False, seed: int = 3, **changes) -> ProblemSet:
    # Puzzles have a largest length, below the default of held-out problems.
    config = ReasoningConfig(task=task, **({"eval_max_length": 20} | changes))
    return ProblemSet.from_config(config, sequence_length=128, seed=seed, held_out=held_out)


def read(task: str, index: int) -> tuple[list[str], list[str]]:
    """Question and answer of a training problem in printed symbols."""
    problems = problem_set(task)
    question, answer = problems.task.describe(problems[index]).split(" => ")
    assert question.startswith("<s>")
    return question.split()[1:], answer.split()


@given(indices)
def test_parity(index: int):
    bits, answer = read("parity", index)
    assert answer == [str(bits[: n + 1].count("1") % 2) for n in range(len(bits))]


@given(indices)
def test_permutation(index: int):
    factors, answer = read("permutation", index)
    for count in range(1, len(factors) + 1):
        product = ""
        for start in range(5):
            place = start
            for factor in factors[:count]:
                place = int(factor[place])
            product += str(place)
        assert product == answer[count - 1]


def number(digits: list[str]) -> int:
    return int("".join(reversed(digits)))


@given(indices)
def test_addition(index: int):
    question, answer = read("addition", index)
    plus, equals = question.index("+"), question.index("=")
    left, right, given_sum = question[:plus], question[plus + 1 : equals], question[equals + 1 :]
    assert len(left) == len(right) == len(given_sum) - 1
    assert answer == [*given_sum, "</s>"]
    assert number(left) + number(right) == number(given_sum)


@given(indices)
def test_hop(index: int):
    question, answer = read("hop", index)
    pairs, place = question[:10], question[10]
    hops = question[11:]
    assert set(hops) == {">"}
    function = dict(zip(pairs[::2], pairs[1::2], strict=True))
    assert sorted(function) == list("abcde")
    for _ in hops:
        place = function[place]
    assert answer == [place]


@given(indices)
def test_pointers(index: int):
    question, answer = read("pointers", index)
    pairs, place = question[:10], question[10]
    assert set(question[11:]) == {">"}
    pointers = dict(zip(pairs[::2], pairs[1::2], strict=True))
    assert sorted(pointers) == sorted(pointers.values()) == list("abcde")
    followed = [place]
    for _ in question[11:]:
        followed.append(pointers[followed[-1]])
    assert answer == followed[1:]
    assert len({*followed[:5]}) == min(5, len(followed))  # No place again before all were seen.


def value_of(expression: Iterator[str], modulus: int) -> int:
    """The value of a prefix expression, by recursion and Python's own arithmetic."""
    symbol = next(expression)
    if symbol not in "+-*":
        return int(symbol, 36)
    left, right = value_of(expression, modulus), value_of(expression, modulus)
    return eval(f"{left} {symbol} {right}") % modulus


@given(indices)
def test_mano(index: int):
    question, answer = read("mano", index)
    *expression, asked = question
    assert asked == "="
    symbols = iter(expression)
    assert value_of(symbols, 23) == int(*answer, 36)
    assert list(symbols) == []  # One expression, and nothing after it.
    assert len([symbol for symbol in expression if symbol in "+-*"]) == len(expression) // 2


def test_mano_asks_once_and_draws_all_shapes_and_symbols_alike():
    problems = problem_set("mano", modulus=3, min_length=3, max_length=3)
    texts = [problems.task.decode(problems[index].tokens[1:-1]) for index in range(4000)]
    assert problems[0].loss_mask.tolist() == [0] * 8 + [1]
    shapes = collections.Counter(
        "".join("x" if symbol in "+-*" else "." for symbol in text.split()) for text in texts
    )
    assert len(shapes) == 5  # Binary trees with three inner nodes.
    assert max(abs(count - 800) for count in shapes.values()) < 100  # Four standard deviations.
    symbols = collections.Counter("".join(texts).replace(" ", ""))
    assert set(symbols) == set("+-*012")
    for kind in ("+-*", "012"):
        counts = [symbols[symbol] for symbol in kind]
        assert max(counts) < 1.06 * min(counts)


def test_the_modulus_is_an_option_of_mano_alone():
    assert problem_set("mano", modulus=7).task.symbols[-1] == "6"
    with pytest.raises(ConfigError, match=r"modulus: 7 would be ignored by task='hop'"):
        ReasoningConfig(task="hop", modulus=7)


def test_addition_targets_are_the_next_tokens():
    problem = problem_set("addition")[17]
    asked = np.flatnonzero(problem.loss_mask)
    np.testing.assert_array_equal(problem.targets[asked[:-1]], problem.tokens[asked[:-1] + 1])


@pytest.mark.parametrize("task", REASONING_TASKS)
def test_lengths_cover_their_range_and_rows_fit(task: str):
    for held_out, (low, high) in ((False, (2, 5)), (True, (6, 9))):
        problems = problem_set(
            task, held_out, min_length=2, max_length=5, eval_min_length=6, eval_max_length=9
        )
        seen = {len(problems[index].tokens) for index in range(200)}
        assert seen == {problems.task.row_length(length) for length in range(low, high + 1)}
        for index in range(50):
            assert problems[index].tokens.max() < problems.task.vocab_size


@pytest.mark.parametrize("task", REASONING_TASKS)
def test_problems_follow_from_seed_and_index_alone(task: str):
    forward = problem_set(task).batch([5, 6, 7])
    backward = problem_set(task).batch([7, 6, 5])
    for one, other in zip(forward[:-1], backward[:-1], strict=True):
        np.testing.assert_array_equal(one, other[::-1])


@pytest.mark.parametrize("task", REASONING_TASKS)
def test_seeds_and_splits_give_other_problems(task: str):
    same_lengths = {"eval_min_length": 8, "eval_max_length": 9, "min_length": 8, "max_length": 9}
    sets = [
        problem_set(task, held_out, seed, **same_lengths)
        for seed, held_out in itertools.product((0, 1), (False, True))
    ]
    for one, other in itertools.combinations(sets, 2):
        equal = (one.batch([*range(40)]).tokens == other.batch([*range(40)]).tokens).all(axis=1)
        assert not equal.any()


def test_a_batch_pads_short_problems_and_missing_rows():
    problems = problem_set("parity")
    batch = problems.batch([0, 1], num_rows=3)
    length = len(problems[1].tokens)
    assert batch.tokens.shape == (3, 128)
    assert batch.segment_ids[1].tolist() == [1] * length + [0] * (128 - length)
    assert batch.positions[1, :length].tolist() == list(range(length))
    assert not batch.loss_mask[2].any()
    assert not batch.segment_ids[2].any()
    assert batch.loss_mask[1].sum() == length - 1


def test_a_row_too_short_for_the_longest_problem_is_an_error():
    with pytest.raises(ConfigError, match=r"data.sequence_length: 99 .* takes 100 positions"):
        ProblemSet.from_config(
            ReasoningConfig(task="addition"), sequence_length=99, seed=0, held_out=False
        )


@pytest.mark.parametrize("option", ["max_length", "eval_max_length"])
def test_a_puzzle_longer_than_any_is_an_error(option: str):
    assert problem_set("sudoku", eval_max_length=24).max_length == 16
    with pytest.raises(ConfigError, match=f"{option}: 25 is more than .* use at most 24"):
        ReasoningConfig(task="sudoku", **({"eval_max_length": 24} | {option: 25}))


@pytest.mark.parametrize(
    ("task", "degree"), [("permutation", 6), ("parity", 4), ("mano", 4), ("maze", 4)]
)
def test_a_number_of_symbols_that_does_not_go_with_the_task_is_an_error(task: str, degree: int):
    with pytest.raises(ConfigError, match=f"num_symbols: {degree}"):
        ReasoningConfig(task=task, num_symbols=degree, eval_max_length=17)


def test_build_task_gives_each_task():
    sizes = [
        build_task(ReasoningConfig(task=task, eval_max_length=17)).vocab_size
        for task in REASONING_TASKS
    ]
    assert dict(zip(REASONING_TASKS, sizes, strict=True)) == {
        "parity": 4,
        "addition": 15,
        "hop": 8,
        "pointers": 8,
        "permutation": 122,
        "mano": 29,
        "sudoku": 9,
        "maze": 7,
    }
