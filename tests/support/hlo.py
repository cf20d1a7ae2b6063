"""Reads compiled programs: which instructions stand inside loops."""

import re


def count_in_loops(text: str, operation: str) -> tuple[int, int]:
    """How often an operation occurs in loop bodies (and what they call), and in the whole program.

    Args:
      text: optimised HLO, from `compiled.as_text()`.
      operation: such as 'all-gather'; its asynchronous start counts too.
    """
    computations = _computations(text)
    pattern = re.compile(rf"\b{re.escape(operation)}(?:-start)?\(")
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
    inside = sum(len(pattern.findall(computations[name])) for name in reached)
    return inside, len(pattern.findall(text))


def _computations(text: str) -> dict[str, str]:
    """Name to text of every computation."""
    found = {}
    for part in re.split(r"\n(?=(?:ENTRY )?%?[\w.\-]+ \(.*\{\n)", text):
        match = re.match(r"(?:ENTRY )?%?([\w.\-]+) \(", part)
        if match:
            found[match.group(1)] = part
    return found
