"""Times and how they are told: rounds, quartiles, and what the numbers were measured on."""

import dataclasses
import functools
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jaxlib
import numpy as np


@dataclasses.dataclass
class Phase:
    """Something that is timed once per round.

    Attributes:
      name: for people.
      prepare: makes the argument of `run`; not timed.
      run: what is timed.
      check: looks at the first result; not timed.
      first_call_s: seconds of the first call, which compiles.
      seconds: of the timed rounds.
    """

    name: str
    prepare: Callable[[], Any]
    run: Callable[[Any], Any]
    check: Callable[[Any], None] | None = None
    first_call_s: float = float("nan")
    seconds: list[float] = dataclasses.field(default_factory=list)

    @property
    def median_s(self) -> float:
        """Of the timed rounds."""
        return statistics.median(self.seconds)


def timed(function: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds until all results are there, and the results."""
    start = time.perf_counter()
    result = jax.block_until_ready(function())
    return time.perf_counter() - start, result


def call_first(phase: Phase) -> Any:
    """Calls a phase for the first time, which compiles, and checks what it returns."""
    argument = jax.block_until_ready(phase.prepare())
    phase.first_call_s, result = timed(lambda: phase.run(argument))
    if phase.check is not None:
        phase.check(result)
    return result


def alternate(phases: Sequence[Phase], rounds: int, warm_up: int = 1) -> None:
    """Runs all phases one after the other in each round, so that all meet the same load.

    Args:
      phases: get their times.
      rounds: timed rounds.
      warm_up: rounds before them that are not timed.
    """
    for round_number in range(-warm_up, rounds):
        for phase in phases:
            argument = jax.block_until_ready(phase.prepare())
            # The result is dropped at once, so that none is kept while the next phase runs.
            seconds = timed(functools.partial(phase.run, argument))[0]
            if round_number >= 0:
                phase.seconds.append(seconds)


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """First quartile, median and third quartile."""
    low, median, high = np.percentile(values, (25, 50, 75))
    return float(low), float(median), float(high)


def by_round(numerators: Sequence[float], denominators: Sequence[float]) -> list[float]:
    """The ratio in each round, of things that ran shortly after each other."""
    return [above / below for above, below in zip(numerators, denominators, strict=True)]


def spread(seconds: Sequence[float]) -> str:
    """Median and quartiles in milliseconds."""
    low, median, high = (1e3 * value for value in quartiles(seconds))
    return f"{median:.1f} ms ({low:.1f} to {high:.1f})"


def environment() -> dict[str, str]:
    """Device and versions."""
    return {
        "device": f"{jax.devices()[0].device_kind} ({platform.machine()}, {os.cpu_count()} cores)",
        "versions": f"python {platform.python_version()}, jax {jax.__version__}, "
        f"jaxlib {jaxlib.__version__}",
    }
