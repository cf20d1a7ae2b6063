"""Puzzles against slow solutions written from their rules."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatransformer_jax.config.data import PUZZLE_LENGTHS
from megatransformer_jax.data.reasoning.puzzles import MAX_BLANKS, Maze, Sudoku, solutions
from megatransformer_jax.data.reasoning.tasks import PAD

seeds = st.integers(0, 2**32 - 1)


def lines_of(task, values) -> list[str]:
    symbols = [task.symbols[value] for value in values[1:]]
    side = round(len(symbols) ** 0.5)
    return ["".join(symbols[row * side : (row + 1) * side]) for row in range(side)]


def all_solutions(grid: list[str]) -> list[list[str]]:
    """Tries every number in the first blank cell."""
    for row, column in itertools.product(range(6), range(6)):
        if grid[row][column] != ".":
            continue
        top, left = row // 2 * 2, column // 3 * 3
        seen = set(grid[row]) | {line[column] for line in grid}
        seen |= {char for line in grid[top : top + 2] for char in line[left : left + 3]}
        found = []
        for number in sorted(set("123456") - seen):
            line = grid[row][:column] + number + grid[row][column + 1 :]
            found += all_solutions([*grid[:row], line, *grid[row + 1 :]])
        return found
    return [grid]


@settings(max_examples=25)
@given(seeds, st.integers(1, MAX_BLANKS))
def test_a_sudoku_has_its_one_solution(seed: int, length: int):
    task = Sudoku()
    problem = task.generate(np.random.default_rng(seed), length)
    grid = lines_of(task, problem.tokens)
    assert "".join(grid).count(".") == length == problem.loss_mask.sum()
    (solved,) = all_solutions(grid)
    answer = np.where(problem.loss_mask == 1, problem.targets, problem.tokens)
    assert lines_of(task, answer) == solved


def test_blank_cells_are_those_asked_for():
    task = Sudoku()
    problem = task.generate(np.random.default_rng(0), 10)
    is_blank = problem.tokens == task.symbols.index(".")
    np.testing.assert_array_equal(is_blank, problem.loss_mask == 1)
    np.testing.assert_array_equal(problem.targets != PAD, is_blank)


def test_the_solver_finds_every_solution():
    grid = [0] * 36
    task = Sudoku()
    problem = task.generate(np.random.default_rng(1), 24)
    for cell, token in enumerate(problem.tokens[1:].tolist()):
        grid[cell] = 1 << (token - 3) if token >= 3 else 0
    given_cells = [cell for cell, bit in enumerate(grid) if bit]
    for cell in given_cells[:5]:
        grid[cell] = 0
    texts = ["".join("." if not bit else str(bit.bit_length()) for bit in grid)]
    rows = [texts[0][start : start + 6] for start in range(0, 36, 6)]
    found = {"".join(str(number + 1) for number in numbers) for numbers in solutions(grid)}
    assert found == {"".join(solved) for solved in all_solutions(rows)}
    assert len(found) > 1


def steps_from(lines: list[str], start: tuple[int, int]) -> dict[tuple[int, int], int]:
    """Distance of every open cell, by breadth-first search."""
    distance, edge = {start: 0}, [start]
    while edge:
        row, column = edge.pop(0)
        for place in ((row + 1, column), (row - 1, column), (row, column + 1), (row, column - 1)):
            inside = 0 <= place[0] < 9 and 0 <= place[1] < 9
            if inside and place not in distance and lines[place[0]][place[1]] != "#":
                distance[place] = distance[row, column] + 1
                edge.append(place)
    return distance


@given(seeds, st.integers(1, PUZZLE_LENGTHS["maze"]))
def test_the_way_is_the_only_one(seed: int, length: int):
    task = Maze()
    problem = task.generate(np.random.default_rng(seed), length)
    lines = lines_of(task, problem.tokens)
    places = {lines[row][column]: (row, column) for row in range(9) for column in range(9)}
    distances = steps_from(lines, places["S"]), steps_from(lines, places["G"])
    assert distances[0][places["G"]] == 2 * length
    is_open = [place for place in np.ndindex(9, 9) if lines[place[0]][place[1]] != "#"]
    # A tree: every open cell can be reached, and there is one passage less than there are cells.
    assert set(distances[0]) == set(is_open)
    passages = sum(
        (row + down, column + right) in distances[0]
        for row, column in is_open
        for down, right in ((0, 1), (1, 0))
    )
    assert passages == len(is_open) - 1
    for row, column in is_open:
        is_on_way = distances[0][row, column] + distances[1][row, column] == 2 * length
        assert task.symbols[problem.targets[1 + 9 * row + column]] == ".o"[is_on_way]
        assert problem.loss_mask[1 + 9 * row + column] == 1
    assert problem.loss_mask.sum() == len(is_open)


@pytest.mark.parametrize("task", [Sudoku(), Maze()])
def test_rows_are_as_long_at_every_length(task):
    problems = [task.generate(np.random.default_rng(0), length) for length in (1, 5, 20)]
    assert {len(problem.tokens) for problem in problems} == {task.row_length(3)}
