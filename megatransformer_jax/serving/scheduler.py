"""What the device does next, decided from counts and times alone: no JAX, no threads.

A launch is `advance`, which iterates the core until enough rows wait for their token, and `turn`,
which gives the waiting rows one and lets rows in whose prompt has been read. Between two launches
at most one chunk of a prompt is read.

- How many rows must wait (`min_waiting`) is chosen by a small simulation: the running rows go on
  from where they are, at the depths that their last tokens had. Waiting for all rows is token-level
  batching. It wins if depths are alike; if they differ, waiting for some rows wins (Continuous
  Depth Batching, arXiv 2608.09444).
- What a turn and a chunk cost, in iterations, is estimated from the launches' durations.
- Prompts get at most a given share of the time while texts are being continued. The prompt with the
  fewest tokens left comes first, and may overtake another only so often.
"""

import collections
import dataclasses
import math
from collections.abc import Hashable, Mapping, Sequence

import numpy as np

# Depths that are remembered of each row.
NUM_DEPTHS = 16
# Launches after which `min_waiting` is chosen again while the same rows run.
_LAUNCHES_PER_CHOICE = 16
# The simulation goes on for so many of the deepest tokens, and at most so many turns.
_SIMULATED_TOKENS = 6
_SIMULATED_TURNS = 192
# Of choices whose throughput differs by less, the one that is fairer to shallow rows is taken. A
# choice is kept unless another is better by more than what depths may vary by chance.
_NEGLIGIBLE = 0.02
_CHANCE = 0.05
# Before anything has been measured: a turn's cost in iterations, and a chunk's.
_FIRST_TURN = 1.5
_FIRST_CHUNK = 8.0
# Launches that the estimate of costs reaches back to, about.
_COST_MEMORY = 200


@dataclasses.dataclass(frozen=True)
class Policy:
    """What an operator may set.

    Attributes:
      rows: of the batch.
      min_waiting: rows that must wait before a turn. None: chosen while serving.
      max_ticks: iterations of one launch, at most.
      max_prefill_share: share of the time that prompts may take while texts are continued; above 0,
        at most 1.
      max_bypasses: how often other prompts may overtake one that is being read.
    """

    rows: int
    min_waiting: int | None = None
    max_ticks: int = 64
    max_prefill_share: float = 0.5
    max_bypasses: int = 16


@dataclasses.dataclass(frozen=True)
class Reading:
    """A prompt that is being read.

    Attributes:
      key: of its text.
      num_left: tokens that are left to read, at least one.
    """

    key: Hashable
    num_left: int


@dataclasses.dataclass(frozen=True)
class Launch:
    """What comes next.

    Attributes:
      chunk: key of the text whose prompt is read on; None for none.
      min_waiting: of `advance`. 0: there is no `advance`, as enough rows wait already.
      is_turn: whether there is a turn (and an `advance` before it) at all.
    """

    chunk: Hashable | None
    min_waiting: int
    is_turn: bool


class Scheduler:
    """Decides launch by launch.

        launch = scheduler.next_launch(running, num_admitted, reading)
        scheduler.see_launch(num_ticks, num_chunks, seconds)   # once it is over
        scheduler.see_row(key, iteration, depth)               # and each row after it

    Args:
      policy: what is allowed.
    """

    def __init__(self, policy: Policy):
        self.policy = policy
        self.costs = Costs()
        self._depths: dict[Hashable, collections.deque[int]] = {}
        self._iterations: dict[Hashable, int] = {}
        self._bypasses: dict[Hashable, int] = {}
        self._credit = 0.0  # Iterations of decoding that prompts may still be read for.
        self._choice = 1
        self._chosen_for: frozenset[Hashable] = frozenset()
        self._launches_since = 0

    def see_row(self, key: Hashable, iteration: int, depth: int | None = None) -> None:
        """Remembers where a text was after a turn.

        Args:
          key: of the text.
          iteration: of the token that is on its way.
          depth: iterations of the token that it got in this turn. None: it got none.
        """
        self._iterations[key] = iteration
        if depth is not None:
            depths = self._depths.setdefault(key, collections.deque(maxlen=NUM_DEPTHS))
            depths.append(max(depth, 1))

    def see_launch(self, num_ticks: int, num_chunks: int, seconds: float) -> None:
        """Remembers how long a launch took."""
        self.costs.observe(num_ticks, num_chunks, seconds)
        share = self.policy.max_prefill_share
        if share < 1:
            self._credit += (num_ticks + self.costs.turn) * share / (1 - share)
        # What was not used in a while is no reason for a burst of chunks.
        self._credit = min(self._credit, self.costs.chunk)

    def forget(self, key: Hashable) -> None:
        """Drops what is known of a text that has ended."""
        self._depths.pop(key, None)
        self._iterations.pop(key, None)
        self._bypasses.pop(key, None)

    def next_launch(
        self,
        running: Mapping[Hashable, int],
        num_admitted: int,
        reading: Sequence[Reading],
    ) -> Launch:
        """What comes next.

        Args:
          running: texts that are being continued, and the largest depth of each.
          num_admitted: texts whose prompt has been read, which the next turn lets in.
          reading: the prompts that are being read, in the order of their arrival.
        """
        is_turn = bool(running) or num_admitted > 0
        chunk = None
        if reading and (not is_turn or self._credit >= 0 or self.policy.max_prefill_share >= 1):
            chunk = self._choose_chunk(reading)
            if is_turn:
                self._credit -= self.costs.chunk
        waiting = self._min_waiting(running) if running else 0
        return Launch(chunk, max(waiting - num_admitted, 0), is_turn)

    def _choose_chunk(self, reading: Sequence[Reading]) -> Hashable:
        """The shortest rest first, unless an older prompt has been overtaken too often."""
        overdue = (
            item for item in reading if self._bypasses.get(item.key, 0) >= self.policy.max_bypasses
        )
        chosen = next(overdue, None) or min(reading, key=lambda item: item.num_left)
        for item in reading:
            if item is chosen:
                break
            self._bypasses[item.key] = self._bypasses.get(item.key, 0) + 1
        return chosen.key

    def _min_waiting(self, running: Mapping[Hashable, int]) -> int:
        if self.policy.min_waiting is not None:
            return min(self.policy.min_waiting, len(running))
        self._launches_since += 1
        keys = frozenset(running)
        if keys != self._chosen_for or self._launches_since >= _LAUNCHES_PER_CHOICE:
            rows = [
                Row(tuple(self._depths.get(key, (depth,))), self._iterations.get(key, 0))
                for key, depth in running.items()
            ]
            self._choice = choose_min_waiting(
                rows, self.costs.turn, self.policy.max_ticks, present=self._choice
            )
            self._chosen_for, self._launches_since = keys, 0
        return self._choice


# ------------------------------------------------------------------------------
# How many rows must wait.


def candidates(num_rows: int) -> list[int]:
    """Numbers of rows that are compared: all up to four, powers of two, quarter, half, all."""
    found = {1, 2, 3, 4, num_rows // 4, num_rows // 2, 3 * num_rows // 4, num_rows}
    found |= {1 << power for power in range(num_rows.bit_length())}
    return sorted(number for number in found if 1 <= number <= num_rows)


@dataclasses.dataclass(frozen=True)
class Row:
    """A running row.

    Attributes:
      depths: iterations of its last tokens, at least one; it is expected to repeat them.
      iteration: of the token on its way.
    """

    depths: tuple[int, ...]
    iteration: int = 0


def choose_min_waiting(
    rows: Sequence[Row], turn_cost: float, max_ticks: int, present: int | None = None
) -> int:
    """The number of waiting rows at which a turn pays most.

    Args:
      rows: those that run.
      turn_cost: of one turn, in iterations.
      max_ticks: iterations after which a turn comes in any case.
      present: what has been chosen so far, which is kept unless another is clearly better.

    Returns:
      1 to the number of rows.
    """
    if len(rows) <= 1:
        return 1
    numbers = candidates(len(rows))
    throughput, slowdown = simulate(rows, numbers, turn_cost, max_ticks)
    best = throughput.max()
    if present in numbers and throughput[numbers.index(present)] >= best * (1 - _CHANCE):
        return present
    is_good = throughput >= best * (1 - _NEGLIGIBLE)
    # Of equals the largest, which keeps rows of one depth together.
    places = [int(place) for place in np.flatnonzero(is_good)]
    return numbers[min(places, key=lambda place: (round(float(slowdown[place]), 3), -place))]


def simulate(
    rows: Sequence[Row], numbers: Sequence[int], turn_cost: float, max_ticks: int
) -> tuple[np.ndarray, np.ndarray]:
    """Tokens per iteration's time, and how much longer a token takes than alone, per number.

    All rows go on to the end of the simulation.

    Args:
      rows: those that run.
      numbers: of waiting rows at which a turn comes.
      turn_cost: of one turn, in iterations.
      max_ticks: iterations after which a turn comes in any case.

    Returns:
      Two float arrays [numbers]; the second is the mean over the rows.
    """
    table = np.asarray([_repeated(row.depths) for row in rows], float)
    places = np.arange(len(table))
    first = table[:, 0] - np.asarray([row.iteration for row in rows])
    left = np.tile(np.maximum(first, 1.0), (len(numbers), 1))
    made = np.minimum(left / table[:, 0], 1.0) - 1.0
    time, count = np.zeros((len(numbers), 1)), np.zeros(left.shape, int)
    nth = np.asarray(numbers)[:, None] - 1
    horizon = _SIMULATED_TOKENS * (table.max() + turn_cost)
    for _ in range(_SIMULATED_TURNS):
        goes_on = time < horizon
        if not goes_on.any():
            break
        ticks = np.take_along_axis(np.sort(left, axis=1), nth, axis=1)
        ticks = np.minimum(ticks, max_ticks)
        is_done = goes_on & (left <= ticks)
        time += goes_on * (ticks + turn_cost)
        count += is_done
        following = table[places, count % NUM_DEPTHS]
        left = np.where(is_done, following, np.where(goes_on, left - ticks, left))
    # Parts of tokens count too, else few turns are a coarse measure.
    made += count + 1 - left / table[places, count % NUM_DEPTHS]
    alone = table.mean(axis=1) + turn_cost
    return made.sum(axis=1) / time[:, 0], (time / made / alone).mean(axis=1)


def _repeated(depths: Sequence[int]) -> list[int]:
    return (list(depths) * (NUM_DEPTHS // len(depths) + 1))[:NUM_DEPTHS]


# ------------------------------------------------------------------------------
# What things cost.


class Costs:
    """Durations of an iteration, a turn and a chunk, from those of whole launches.

    Least squares with exponential forgetting. The expected ratios weigh as much as a few launches,
    so that launches that are all alike cannot lead anywhere.

    Attributes:
      turn: cost of a turn, in iterations.
      chunk: cost of a chunk, in iterations.
    """

    def __init__(self) -> None:
        self._products = np.zeros((3, 3))
        self._sums = np.zeros(3)
        self.turn = _FIRST_TURN
        self.chunk = _FIRST_CHUNK

    def observe(self, num_ticks: int, num_chunks: int, seconds: float) -> None:
        """Takes in a launch of so many iterations, one turn and so many chunks."""
        if not (seconds > 0 and math.isfinite(seconds)):
            return
        expected = num_ticks + self.turn + num_chunks * self.chunk
        per_tick = self._per_tick()
        if per_tick is not None:
            # A machine that did something else for a while says nothing of the costs.
            seconds = min(seconds, 2 * per_tick * expected)
        # Relative errors count, as launches differ in length.
        weight = 1 / expected**2
        row = np.asarray([num_ticks, 1.0, num_chunks])
        keep = 1 - 1 / _COST_MEMORY
        self._products = keep * self._products + weight * np.outer(row, row)
        self._sums = keep * self._sums + weight * row * seconds
        self._solve()

    def _per_tick(self) -> float | None:
        """Seconds of an iteration at the present ratios."""
        row = np.asarray([1.0, self.turn, self.chunk])
        size = row @ self._products @ row
        return float(row @ self._sums / size) if size > 0 else None

    def _solve(self) -> None:
        per_tick = self._per_tick()
        if per_tick is None or per_tick <= 0:
            return
        # Pulls turn and chunk towards their present ratios to an iteration, weakly.
        pull = np.zeros((3, 3))
        for place, ratio in ((1, self.turn), (2, self.chunk)):
            row = np.zeros(3)
            row[0], row[place] = ratio, -1.0
            pull += np.outer(row, row) / max(ratio, 1.0) ** 2
        weight = 1e-2 * (1 + np.trace(self._products) / 3)
        products = self._products + weight * pull
        tick, turn, chunk = np.linalg.lstsq(products, self._sums, rcond=None)[0]
        if tick <= 0:
            return
        self.turn = float(np.clip(turn / tick, 0.1, 64.0))
        self.chunk = float(np.clip(chunk / tick, 0.1, 512.0))
