"""How long a batch's programs take on this device, for whoever decides what comes next."""

import dataclasses
import time
from collections.abc import Callable, Mapping
from typing import Any

from megatransformer_jax.generation.continuous.lanes import RowText, StepLimits

# Iterations that a token is timed for.
_TICKS = 16


@dataclasses.dataclass(frozen=True)
class Durations:
    """Seconds that things take.

    Attributes:
      tick: an iteration of all rows; without a core, a turn.
      turn: a turn.
      chunks: by its size, a chunk of a prompt without the core, an iteration of the core over it at
        the beginning of a row, and at its end.
      begun: by their size, the first chunks of several prompts at once without the core, and an
        iteration of the core over them.
    """

    tick: float
    turn: float
    chunks: Mapping[int, tuple[float, float, float]]
    begun: Mapping[int, tuple[float, float]]


def measure(batcher: Any, repeats: int) -> Durations:
    """Measures what things take now; drops what rows hold.

    Args:
      batcher: a `Batcher`, whose programs are compiled.
      repeats: of which the shortest counts.
    """
    begun = {size: _begun(batcher, repeats, size) for size in batcher.begun_sizes}
    chunks = {size: _chunk(batcher, repeats, size) for size in batcher.shape.chunks}
    batcher.turn()
    # Almost all of a token's iterations, and then the last, after which it is written.
    many, last = [], []
    for _ in range(repeats):
        many.append(_seconds(batcher, lambda: batcher.step(StepLimits(1, _TICKS - 1))))
        last.append(_seconds(batcher, lambda: batcher.step(StepLimits(1, 1))))
    batcher.release([0])
    turn = tick = min(last)
    if batcher.has_core:  # Else a turn is all there is.
        tick = abs(min(many) - min(last)) / (_TICKS - 2)
        turn = max(min(last) - tick, tick)  # As timings jitter.
    return Durations(tick, turn, chunks, begun)


def _chunk(batcher: Any, repeats: int, size: int) -> tuple[float, float, float]:
    """Of a chunk without the core, and of an iteration of the core over two of them."""
    capacity = batcher.shape.capacity
    length = max(min(size, capacity - repeats - 2), 1)
    end = max(capacity - length - repeats - 2, 0)
    shallow = _reading(batcher, repeats, size, length, 0, 1)
    iterations = []
    # The beginning last, so that the row is short for what is measured next.
    for start in (end, 0):
        deep = _reading(batcher, repeats, size, length, start, _TICKS)
        iterations.append(max((deep - shallow) / (_TICKS - 1), 0.0))
    last, first = iterations
    return max(shallow - first, 0.0), first, max(first, last)


def _reading(batcher: Any, repeats: int, size: int, length: int, start: int, depth: int) -> float:
    """The shortest time of a chunk of `length` tokens behind `start` others."""
    text, taken = RowText((0,) * (start + length + 1), repeats + 1, depth), []
    for _ in range(repeats):
        batcher.place(0, text)
        if start:  # As if they had been read: what is there takes as long.
            batcher.copy(0, 0, start)
        taken.append(_seconds(batcher, lambda: batcher.prefill(0, size)))
    return min(taken)


def _begun(batcher: Any, repeats: int, size: int) -> tuple[float, float]:
    """Of `begin` without the core, and of an iteration of the core over all of its prompts."""
    rows = range(batcher.most_begun)
    length = max(min(size, batcher.shape.capacity - 2), 1)
    least = []
    for depth in (1, _TICKS):
        text, taken = RowText((0,) * (length + 1), 1, depth), []
        for _ in range(repeats):
            for row in rows:
                batcher.place(row, text)
            taken.append(_seconds(batcher, lambda: batcher.begin(rows, size)))
        least.append(min(taken))
    batcher.release(rows)
    iteration = max((least[1] - least[0]) / (_TICKS - 1), 0.0)
    return max(least[0] - iteration, 0.0), iteration


def _seconds(batcher: Any, function: Callable[[], object]) -> float:
    batcher.wait()
    began = time.perf_counter()
    function()
    batcher.wait()
    return time.perf_counter() - began
