"""Puzzles on a grid, which are solved by looking at all cells again and again: sudoku and mazes.

A row is the start token and the cells from left to right and from top to bottom; under each cell
that is asked for stands its answer. Every cell may say something about every other, so a model
needs `attention.is_causal=False`.
"""

import dataclasses
import functools
import itertools
from collections.abc import Iterator

import numpy as np

from megatransformer_jax.data.reasoning.tasks import BOS, PAD, Problem, Task


def _grid_problem(cells: np.ndarray, answers: np.ndarray, is_asked: np.ndarray) -> Problem:
    """A start token, then `cells`; under those that are asked for their answers."""
    tokens = np.concatenate(([BOS], cells)).astype(np.int32)
    targets = np.concatenate(([PAD], np.where(is_asked, answers, PAD))).astype(np.int32)
    return Problem(tokens, targets, np.concatenate(([0], is_asked)).astype(np.float32))


# ------------------------------------------------------------------------------
# Sudoku of 6 x 6 cells.

SIDE, BOX_ROWS, BOX_COLUMNS = 6, 2, 3
CELLS = SIDE * SIDE
BLANK, FIRST_NUMBER = 2, 3
# Every stored puzzle has this many cells that may be blank together.
MAX_BLANKS = 24
NUM_STORED = 1024
_ALL_NUMBERS = (1 << SIDE) - 1
# Row, column and box of each cell, in one numbering of all units.
_UNITS = tuple(
    (row, SIDE + column, 2 * SIDE + row // BOX_ROWS * BOX_ROWS + column // BOX_COLUMNS)
    for row in range(SIDE)
    for column in range(SIDE)
)


@dataclasses.dataclass(frozen=True)
class Sudoku(Task):
    """6 x 6 cells; each row, column and box of 2 x 3 has the numbers 1 to 6. Length: blank cells.

    `<s> . 2 3 ...` asks for the numbers of the blank cells, which follow from the others: there is
    exactly one solution. A problem is one of `NUM_STORED` puzzles, with numbers renamed, rows,
    columns, bands and stacks swapped, and some of its blank cells filled in. There are 2.5 million
    such forms of each puzzle before any cell is filled in.
    """

    @property
    def symbols(self) -> tuple[str, ...]:
        """Padding, start, the blank and the numbers."""
        return ("<pad>", "<s>", ".", *(str(number + 1) for number in range(SIDE)))

    def row_length(self, length: int) -> int:
        """The start token and the cells, however many are blank."""
        del length
        return 1 + CELLS

    def generate(self, rng: np.random.Generator, length: int) -> Problem:
        """A random form of a random stored puzzle."""
        puzzle = _stored_puzzle(int(rng.integers(NUM_STORED)))
        blanks = rng.choice(np.array(puzzle.may_be_blank), length, replace=False)
        is_blank = np.zeros(CELLS, bool)
        is_blank[blanks] = True
        places = _shuffled_places(rng)
        numbers = rng.permutation(SIDE)[np.array(puzzle.solution)[places]]
        is_blank = is_blank[places]
        answers = FIRST_NUMBER + numbers
        return _grid_problem(np.where(is_blank, BLANK, answers), answers, is_blank)


@dataclasses.dataclass(frozen=True)
class _Puzzle:
    """A solved grid, numbers from 0, and cells that the others determine together."""

    solution: tuple[int, ...]
    may_be_blank: tuple[int, ...]


@functools.cache
def _stored_puzzle(index: int) -> _Puzzle:
    """Puzzle `index`, made when it is first asked for: a random grid, less cell after cell."""
    rng = np.random.Generator(np.random.Philox(key=np.array([SIDE, index], np.uint64)))
    while True:
        grid = [1 << number for number in next(solutions([0] * CELLS, rng))]
        solution = tuple(number.bit_length() - 1 for number in grid)
        blanks = []
        for cell in rng.permutation(CELLS).tolist():
            number, grid[cell] = grid[cell], 0
            if len(list(itertools.islice(solutions(grid), 2))) == 1:
                blanks.append(cell)
            else:
                grid[cell] = number
        if len(blanks) >= MAX_BLANKS:
            return _Puzzle(solution, tuple(blanks))


def solutions(grid: list[int], rng: np.random.Generator | None = None) -> Iterator[list[int]]:
    """All ways to fill a grid, as numbers from 0.

    Args:
      grid: of each cell 1 << number, or 0 if it is blank.
      rng: in which order numbers are tried. None: ascending.
    """
    used = [0] * (3 * SIDE)
    for cell, bit in enumerate(grid):
        for unit in _UNITS[cell]:
            used[unit] |= bit
    yield from _fill(list(grid), used, rng)


def _fill(grid: list[int], used: list[int], rng: np.random.Generator | None) -> Iterator[list[int]]:
    """Fills the blank cell that has the fewest choices, and goes on from each of them."""
    best, choices, fewest = -1, 0, SIDE + 1
    for cell, bit in enumerate(grid):
        if bit:
            continue
        row, column, box = _UNITS[cell]
        free = _ALL_NUMBERS & ~(used[row] | used[column] | used[box])
        count = free.bit_count()
        if count < fewest:
            best, choices, fewest = cell, free, count
            if count < 2:
                break
    if best < 0:
        yield [bit.bit_length() - 1 for bit in grid]
        return
    order = range(SIDE) if rng is None else rng.permutation(SIDE).tolist()
    for number in order:
        bit = 1 << number
        if not choices & bit:
            continue
        grid[best] = bit
        for unit in _UNITS[best]:
            used[unit] |= bit
        yield from _fill(grid, used, rng)
        grid[best] = 0
        for unit in _UNITS[best]:
            used[unit] &= ~bit


def _shuffled_places(rng: np.random.Generator) -> np.ndarray:
    """Which cell comes to each place: rows swap within bands, bands with each other, columns so."""
    rows, columns = (
        np.concatenate(
            [group * size + rng.permutation(size) for group in rng.permutation(SIDE // size)]
        )
        for size in (BOX_ROWS, BOX_COLUMNS)
    )
    return (rows[:, None] * SIDE + columns).reshape(-1)


# ------------------------------------------------------------------------------
# Mazes of 9 x 9 cells.

MAZE_SIDE = 9
# Rooms stand at even rows and columns, doors and walls between them.
ROOMS = (MAZE_SIDE + 1) // 2
MAX_MOVES = 20
WALL, FLOOR, START, GOAL, ON_PATH = 2, 3, 4, 5, 6


@dataclasses.dataclass(frozen=True)
class Maze(Task):
    """9 x 9 cells with one way from S to G: under each open cell `o` if it is on it, else `.`.

    Length: rooms that the way passes after S. The 25 rooms stand in every second row and column,
    and a random depth-first walk opened the doors, so that there is exactly one way between any
    two rooms, with long dead ends. A way of `length` rooms has 2 length + 1 cells.
    """

    @property
    def symbols(self) -> tuple[str, ...]:
        """Padding, start token, wall, open, first and last cell, and the mark of the way."""
        return ("<pad>", "<s>", "#", ".", "S", "G", "o")

    def row_length(self, length: int) -> int:
        """The start token and the cells, however long the way."""
        del length
        return 1 + MAZE_SIDE * MAZE_SIDE

    def generate(self, rng: np.random.Generator, length: int) -> Problem:
        """A random maze, and in it a random pair of rooms that are `length` doors apart."""
        while True:
            doors = _random_doors(rng)
            for start in rng.permutation(ROOMS * ROOMS).tolist():
                ways = [way for way in _ways_from(start, doors) if len(way) == length + 1]
                if ways:
                    return _maze_problem(doors, ways[int(rng.integers(len(ways)))])


def _random_doors(rng: np.random.Generator) -> list[list[int]]:
    """Of each room the rooms that a door leads to: a tree, made by a random depth-first walk."""
    doors: list[list[int]] = [[] for _ in range(ROOMS * ROOMS)]
    # Drawn at once, because a call per step would take most of the time.
    draws = iter(rng.random(2 * ROOMS * ROOMS).tolist())
    way = [int(next(draws) * ROOMS * ROOMS)]
    is_new = [True] * (ROOMS * ROOMS)
    is_new[way[0]] = False
    while way:
        choices = [room for room in _NEIGHBOURS[way[-1]] if is_new[room]]
        if not choices:
            way.pop()
            continue
        room = choices[int(next(draws) * len(choices))]
        doors[way[-1]].append(room)
        doors[room].append(way[-1])
        is_new[room] = False
        way.append(room)
    return doors


def _ways_from(start: int, doors: list[list[int]]) -> Iterator[list[int]]:
    """The way to each room from one of them, the rooms in order."""
    ways = [[start]]
    while ways:
        way = ways.pop()
        yield way
        came_from = way[-2] if len(way) > 1 else -1
        ways += [[*way, room] for room in doors[way[-1]] if room != came_from]


def _maze_problem(doors: list[list[int]], way: list[int]) -> Problem:
    cells = np.full(MAZE_SIDE * MAZE_SIDE, WALL)
    for room, others in enumerate(doors):
        cells[_CELL_OF_ROOM[room]] = FLOOR
        for other in others:
            cells[_door(room, other)] = FLOOR
    answers = cells.copy()
    answers[[_CELL_OF_ROOM[room] for room in way]] = ON_PATH
    answers[[_door(*pair) for pair in itertools.pairwise(way)]] = ON_PATH
    cells[_CELL_OF_ROOM[way[0]]], cells[_CELL_OF_ROOM[way[-1]]] = START, GOAL
    return _grid_problem(cells, answers, cells != WALL)


def _neighbours(room: int) -> tuple[int, ...]:
    row, column = divmod(room, ROOMS)
    places = ((row - 1, column), (row + 1, column), (row, column - 1), (row, column + 1))
    return tuple(r * ROOMS + c for r, c in places if 0 <= r < ROOMS and 0 <= c < ROOMS)


_NEIGHBOURS = tuple(map(_neighbours, range(ROOMS * ROOMS)))
_CELL_OF_ROOM = tuple(
    2 * row * MAZE_SIDE + 2 * column for row in range(ROOMS) for column in range(ROOMS)
)


def _door(room: int, other: int) -> int:
    """The cell between two neighbours."""
    return (_CELL_OF_ROOM[room] + _CELL_OF_ROOM[other]) // 2
