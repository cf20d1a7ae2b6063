"""What the device does next, decided from counts and times alone: no JAX, no threads.

A launch is `advance`, which iterates the core until enough rows wait for their token, and `turn`,
which gives the waiting rows one and lets rows in whose prompt has been read; or some of both, while
nobody waits for single tokens and there is no prompt to be read. Between two launches at most one
chunk of a prompt is read.

- How many rows must wait (`min_waiting`) is chosen by a small simulation: the running rows go on
  from where they are, at the depths that their last tokens had. Waiting for all rows is token-level
  batching. It wins if depths are alike; if they differ, waiting for some rows wins (Continuous
  Depth Batching, arXiv 2608.09444).
- What a turn and a chunk cost, in iterations, is measured when the server starts.
- Prompts get at most a given share of the time while texts are being continued. The prompt with the
  fewest tokens left comes first, and may overtake another only so often.
"""

import collections
import dataclasses
from collections.abc import Hashable, Mapping, Sequence

import numpy as np

# A chunk may take as long as so many tokens of the running texts, if somebody streams one: then
# they get theirs in less than twice the usual time, but for what the two take from each other
# (memory, caches), which makes it less than three times on a CPU.
_MOST_STEPS = 0.75
# An iteration of a chunk that was too fast to be measured is taken for so many of the batch.
_LEAST = 0.01
# A text whose prompt has been read waits for a row to finish as long as so many turns take, before
# there is a turn for it alone.
_TURNS_TO_ENTER = 2.0
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
# Iterations after which a turn may be due in any case, however few rows wait.
_CLOCKS = (4, 8, 16)
# A choice that makes the worst row wait for so much longer is not kept.
_UNFAIR = 1.25


@dataclasses.dataclass(frozen=True)
class Policy:
    """What an operator may set.

    Attributes:
      rows: of the batch.
      min_waiting: rows that must wait before a turn. None: chosen while serving.
      max_ticks: iterations before a turn, at most.
      max_turns: of one launch.
      max_prefill_share: share of the time that prompts may take while texts are continued; above 0,
        at most 1.
      max_bypasses: how often other prompts may overtake one that is being read.
    """

    rows: int
    min_waiting: int | None = None
    max_ticks: int = 64
    max_turns: int = 1
    max_prefill_share: float = 0.5
    max_bypasses: int = 16


@dataclasses.dataclass(frozen=True)
class Costs:
    """What things cost, in iterations of the whole batch.

    Attributes:
      turn: of a turn.
      chunks: by the number of its tokens, a chunk of a prompt without the core, an iteration of the
        core over the first one, and over the last of a full row. These are the sizes that there
        are.
      part_size: of the chunks that may be read in parts, some iterations at a time. None: none.
      begun: by its size, the first chunks of several prompts at once without the core, and an
        iteration of the core over them.
      most_begun: how many prompts that may be.
    """

    turn: float = 1.5
    chunks: Mapping[int, tuple[float, float, float]] = dataclasses.field(
        default_factory=lambda: {16: (1.5, 1.0, 1.0), 64: (1.5, 2.0, 2.0)}
    )
    part_size: int | None = None
    begun: Mapping[int, tuple[float, float]] = dataclasses.field(default_factory=dict)
    most_begun: int = 0

    def of_chunk(self, size: int, depth: int, place: float = 0.0) -> float:
        """Of a chunk that is read at a depth, where so large a part of the row has been read."""
        once, iteration = self.of_parts(size, place)
        return once + depth * iteration

    def of_parts(self, size: int, place: float = 0.0) -> tuple[float, float]:
        """What is done once in a chunk, and one iteration of it."""
        once, first, last = self.chunks[size]
        return once, first + place * (last - first)


@dataclasses.dataclass(frozen=True)
class Reading:
    """A prompt that is being read.

    Attributes:
      key: of its text.
      num_left: tokens that are left to read, at least one.
      depth: iterations of each, at most.
      place: tokens that have been read, of those that a row holds.
      may_be_short: whether it may be read in short chunks.
      begun: size of the chunk that has been read in part, and its iterations so far. None: there is
        none.
    """

    key: Hashable
    num_left: int
    depth: int = 1
    place: float = 0.0
    may_be_short: bool = True
    begun: tuple[int, int] | None = None

    @property
    def is_new(self) -> bool:
        """Whether it may be begun together with others."""
        return self.may_be_short and self.place == 0 and self.begun is None


@dataclasses.dataclass(frozen=True)
class Launch:
    """What comes next.

    Attributes:
      chunk: key of the text whose prompt is read on; None for none.
      chunk_size: how many tokens of it, or of each that is begun; 0 for none.
      chunk_iterations: how many of the chunk's iterations, of which the others come later. None:
        all that are left.
      min_waiting: of `advance`. 0: there is no `advance`, as enough rows wait already.
      max_ticks: of `advance`.
      is_turn: whether there is a turn (and an `advance` before it) at all.
      turns: how many, at most.
      begun: keys of the texts whose prompts are read from beginning to end, all at once, instead of
        a chunk.
    """

    chunk: Hashable | None
    chunk_size: int
    min_waiting: int
    max_ticks: int
    is_turn: bool
    turns: int = 1
    chunk_iterations: int | None = None
    begun: tuple[Hashable, ...] = ()


class Scheduler:
    """Decides launch by launch.

        launch = scheduler.next_launch(running, num_admitted, reading)
        scheduler.see_turn(num_ticks)              # of which there may be some
        scheduler.see_row(key, iteration, depth)   # and each row after it

    Args:
      policy: what is allowed.
      costs: as measured.
    """

    def __init__(self, policy: Policy, costs: Costs):
        self.policy = policy
        self.costs = costs
        self._depths: dict[Hashable, collections.deque[int]] = {}
        self._iterations: dict[Hashable, int] = {}
        self._bypasses: dict[Hashable, int] = {}
        self._credit = 0.0  # Iterations of decoding that prompts may still be read for.
        self._choice = Choice(1, policy.max_ticks)
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

    def see_turn(self, num_ticks: int) -> None:
        """Remembers a turn and so many iterations before it."""
        share = self.policy.max_prefill_share
        if share < 1:
            self._credit += (num_ticks + self.costs.turn) * share / (1 - share)
        # What was not used in a while is no reason for a burst of chunks.
        self._credit = min(self._credit, 0.0)

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
        *,
        is_streamed: bool = True,
    ) -> Launch:
        """What comes next.

        Args:
          running: texts that are being continued, and the largest depth of each.
          num_admitted: texts whose prompt has been read, which the next turn lets in.
          reading: the prompts that are being read, in the order of their arrival.
          is_streamed: whether somebody waits for single tokens.
        """
        is_turn = bool(running) or num_admitted > 0
        chunk, size, iterations = None, 0, None
        begun: tuple[Hashable, ...] = ()
        if reading and (not is_turn or self._credit >= 0 or self.policy.max_prefill_share >= 1):
            most = self._longest(running) if running and is_streamed else float("inf")
            size, begun, cost = self._choose_begun(reading, most)
            if not begun:
                chosen = self._choose_chunk(reading)
                chunk = chosen.key
                size, iterations = self._chunk_size(chosen, most)
                cost = self._cost_of(chosen, size, iterations)
            if is_turn:
                self._credit -= cost
        if not running:
            return Launch(chunk, size, 0, 0, is_turn, chunk_iterations=iterations, begun=begun)
        choice = self._choose(running)
        min_waiting, max_ticks = choice.min_waiting, choice.max_ticks
        if num_admitted:
            min_waiting = max(min_waiting - num_admitted, 1)
            max_ticks = min(max_ticks, max(round(_TURNS_TO_ENTER * self.costs.turn), 1))
        waits = is_streamed or num_admitted or reading
        turns = 1 if waits else self.policy.max_turns
        return Launch(chunk, size, min_waiting, max_ticks, is_turn, turns, iterations, begun)

    def _chunk_size(self, chosen: Reading, most: float) -> tuple[int, int | None]:
        """Reads what is left fastest, unless that takes longer than `most`.

        Then in short chunks; if these take too long too, in some iterations of one at a time.
        """
        whole = max(self.costs.chunks)
        if chosen.begun is not None:
            size = chosen.begun[0]
            return size, self._iterations_within(most, chosen, size)
        if not chosen.may_be_short:
            return whole, None
        each = {
            size: self.costs.of_chunk(size, chosen.depth, chosen.place)
            for size in self.costs.chunks
        }
        num_left = min(chosen.num_left, whole)
        # Of equals the largest, which is fewer launches.
        fastest = min(each, key=lambda size: (-(-num_left // size) * each[size], -size))
        if each[fastest] <= most:
            return fastest, None
        brief = [size for size in each if each[size] <= most]
        if brief:
            return max(brief), None
        if self.costs.part_size is None:
            return min(each, key=lambda size: each[size]), None
        return self.costs.part_size, self._iterations_within(most, chosen, self.costs.part_size)

    def _longest(self, running: Mapping[Hashable, int]) -> float:
        """How long what is read in one launch may take."""
        depths = [depth for key in running for depth in self._depths.get(key, ())]
        step = self.costs.turn + float(np.mean(depths or list(running.values())))
        return _MOST_STEPS * step

    def _choose_begun(
        self, reading: Sequence[Reading], most: float
    ) -> tuple[int, tuple[Hashable, ...], float]:
        """Short prompts that are read at once because that is faster than one by one, if any are.

        Args:
          reading: all prompts that are being read.
          most: how long that may take.

        Returns:
          The size, the keys of their texts, and what that costs.
        """
        nothing: tuple[int, tuple[Hashable, ...], float] = (0, (), 0.0)
        if any(self._is_overdue(item) for item in reading):
            return nothing
        best, most_saved = nothing, 0.0
        for size, (once, iteration) in self.costs.begun.items():
            found = [item for item in reading if item.is_new and item.num_left <= size]
            found = found[: self.costs.most_begun]
            if len(found) < 2:
                continue
            cost = once + iteration * max(item.depth for item in found)
            saved = sum(self._cost_alone(item) for item in found) - cost
            if cost <= most and saved > most_saved:
                best, most_saved = (size, tuple(item.key for item in found), cost), saved
        for item in reading if best[1] else ():
            if item.key not in best[1]:
                self._bypasses[item.key] = self._bypasses.get(item.key, 0) + 1
        return best

    def _cost_alone(self, item: Reading) -> float:
        """Of a prompt that one chunk reads."""
        sizes = [size for size in self.costs.chunks if size >= item.num_left]
        return min(self.costs.of_chunk(size, item.depth) for size in sizes)

    def _iterations_within(self, most: float, chosen: Reading, size: int) -> int | None:
        """Iterations of a chunk that take no longer than `most`; None if none is left then."""
        left = chosen.depth - (chosen.begun[1] if chosen.begun else 0)
        once, iteration = self.costs.of_parts(size, chosen.place)
        if most == float("inf"):
            return None
        fitting = max(int((most - once) / max(iteration, _LEAST)), 1)
        # Parts of about the same size.
        num_parts = -(-left // fitting)
        return None if num_parts <= 1 else -(-left // num_parts)

    def _cost_of(self, chosen: Reading, size: int, iterations: int | None) -> float:
        once, iteration = self.costs.of_parts(size, chosen.place)
        done = chosen.begun[1] if chosen.begun else 0
        # What is done once is counted with the first part, though the last has some of it.
        return once * (not done) + iteration * (iterations or chosen.depth - done)

    def _is_overdue(self, item: Reading) -> bool:
        return self._bypasses.get(item.key, 0) >= self.policy.max_bypasses

    def _choose_chunk(self, reading: Sequence[Reading]) -> Reading:
        """The shortest rest first, unless an older prompt has been overtaken too often."""
        overdue = (item for item in reading if self._is_overdue(item))
        chosen = next(overdue, None) or min(reading, key=lambda item: item.num_left)
        for item in reading:
            if item is chosen:
                break
            self._bypasses[item.key] = self._bypasses.get(item.key, 0) + 1
        return chosen

    def _choose(self, running: Mapping[Hashable, int]) -> "Choice":
        if self.policy.min_waiting is not None:
            return Choice(min(self.policy.min_waiting, len(running)), self.policy.max_ticks)
        self._launches_since += 1
        keys = frozenset(running)
        if keys != self._chosen_for or self._launches_since >= _LAUNCHES_PER_CHOICE:
            rows = [
                Row(tuple(self._depths.get(key, (depth,))), self._iterations.get(key, 0))
                for key, depth in running.items()
            ]
            self._choice = choose(
                rows, self.costs.turn, self.policy.max_ticks, present=self._choice
            )
            self._chosen_for, self._launches_since = keys, 0
        return self._choice


# ------------------------------------------------------------------------------
# How many rows must wait.


@dataclasses.dataclass(frozen=True)
class Choice:
    """When a turn comes.

    Attributes:
      min_waiting: once so many rows wait.
      max_ticks: after so many iterations in any case.
    """

    min_waiting: int
    max_ticks: int


def candidates(num_rows: int, max_ticks: int) -> list[Choice]:
    """What is compared: all up to four rows, powers of two, quarters and all; and clocks."""
    found = {1, 2, 3, 4, num_rows // 4, num_rows // 2, 3 * num_rows // 4, num_rows}
    found |= {1 << power for power in range(num_rows.bit_length())}
    numbers = sorted(number for number in found if 1 <= number <= num_rows)
    clocks = [Choice(num_rows, ticks) for ticks in _CLOCKS if ticks < max_ticks]
    return [Choice(number, max_ticks) for number in numbers] + clocks


@dataclasses.dataclass(frozen=True)
class Row:
    """A running row.

    Attributes:
      depths: iterations of its last tokens, at least one; it is expected to repeat them.
      iteration: of the token on its way.
    """

    depths: tuple[int, ...]
    iteration: int = 0


def choose(
    rows: Sequence[Row], turn_cost: float, max_ticks: int, present: Choice | None = None
) -> Choice:
    """When turns pay most.

    Args:
      rows: those that run.
      turn_cost: of one turn, in iterations.
      max_ticks: iterations after which a turn comes in any case.
      present: what has been chosen so far, which is kept unless another is clearly better.

    Returns:
      One of the candidates.
    """
    choices = candidates(len(rows), max_ticks)
    if len(rows) <= 1:
        return choices[0]
    throughput, slowdown = simulate(rows, choices, turn_cost)
    best = throughput.max()
    good = [int(place) for place in np.flatnonzero(throughput >= best * (1 - _NEGLIGIBLE))]
    # Of equals the one with most waiting rows, which keeps rows of one depth together.
    fair = min(
        good,
        key=lambda place: (
            round(float(slowdown[place]), 2),
            -choices[place].min_waiting,
            -choices[place].max_ticks,
        ),
    )
    if present in choices:
        place = choices.index(present)
        is_fair = slowdown[place] <= _UNFAIR * slowdown[fair]
        if throughput[place] >= best * (1 - _CHANCE) and is_fair:
            return present
    return choices[fair]


def simulate(
    rows: Sequence[Row], choices: Sequence[Choice], turn_cost: float
) -> tuple[np.ndarray, np.ndarray]:
    """Tokens per iteration's time, and how much longer a token takes than alone, per choice.

    All rows go on to the end of the simulation.

    Args:
      rows: those that run.
      choices: when a turn comes.
      turn_cost: of one turn, in iterations.

    Returns:
      Two float arrays [choices]; the second is that of the row that suffers most.
    """
    table = np.asarray([_repeated(row.depths) for row in rows], float)
    places = np.arange(len(table))
    first = table[:, 0] - np.asarray([row.iteration for row in rows])
    left = np.tile(np.maximum(first, 1.0), (len(choices), 1))
    made = np.minimum(left / table[:, 0], 1.0) - 1.0
    time, count = np.zeros((len(choices), 1)), np.zeros(left.shape, int)
    nth = np.asarray([choice.min_waiting for choice in choices])[:, None] - 1
    max_ticks = np.asarray([choice.max_ticks for choice in choices])[:, None]
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
    return made.sum(axis=1) / time[:, 0], (time / made / alone).max(axis=1)


def _repeated(depths: Sequence[int]) -> list[int]:
    return (list(depths) * (NUM_DEPTHS // len(depths) + 1))[:NUM_DEPTHS]
