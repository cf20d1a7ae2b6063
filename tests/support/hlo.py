"""Reads compiled programs: which instructions stand inside loops."""

import math
import re


def count_in_loops(text: str, operation: str) -> tuple[int, int]:
    """How often an operation occurs in loop bodies (and what they call), and in the whole program.

    Args:
      text: optimised HLO, from `compiled.as_text()`.
      operation: such as 'all-gather'; its asynchronous start counts too.
    """
    computations = _computations(text)
    pattern = re.compile(rf"\b{re.escape(operation)}(?:-start)?\(")
    reached = _inside_loops(text, computations)
    inside = sum(len(pattern.findall(computations[name])) for name in reached)
    return inside, len(pattern.findall(text))


def _inside_loops(text: str, computations: dict[str, str]) -> set[str]:
    """Names of computations that loops run."""
    reached: set[str] = set()
    waiting = set(re.findall(r"\bbody=%?([\w.\-]+)", text))
    while waiting:
        name = waiting.pop()
        reached.add(name)
        called = re.findall(r"(?:calls|to_apply|body|condition)=%?([\w.\-]+)", computations[name])
        called += [
            callee.strip().lstrip("%")
            for group in re.findall(
                r"(?:branch_computations|called_computations)=\{([^}]*)\}", computations[name]
            )
            for callee in group.split(",")
        ]
        waiting |= set(called) - reached
    return reached


def reduced_numbers(text: str) -> tuple[list[int], list[int]]:
    """Sizes of the arrays that all-reduces sum, in loops and outside of them."""
    computations = _computations(text)
    loops = _inside_loops(text, computations)
    found: tuple[list[int], list[int]] = ([], [])
    for name, body in computations.items():
        for line in re.findall(r"= (.*?) all-reduce(?:-start)?\(", body):
            sizes = [
                math.prod(map(int, filter(None, dims.split(","))))
                for dims in re.findall(r"\w+\[([\d,]*)\]", line)
            ]
            found[name not in loops].extend(sizes)
    return found


def _computations(text: str) -> dict[str, str]:
    """Name to text of every computation."""
    found = {}
    for part in re.split(r"\n(?=(?:ENTRY )?%?[\w.\-]+ \(.*\{\n)", text):
        match = re.match(r"(?:ENTRY )?%?([\w.\-]+) \(", part)
        if match:
            found[match.group(1)] = part
    return found
