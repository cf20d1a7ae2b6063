"""Exchanges that run next to computation: how much of their time it hides, by the schedule.

An asynchronous exchange has a start and an end in the schedule. What stands between them runs
meanwhile, loops included. So of an exchange as much is hidden as these operations take, at most all
of it. Where several exchanges are on their way at once, they take turns, because they share links;
each operation hides one of them at a time.
"""

from collections.abc import Mapping

from megatransformer_jax.compiled.collectives import DONE, START, collective_kind
from megatransformer_jax.compiled.course import Course
from megatransformer_jax.compiled.hlo import Computation, Module, Op


def hidden_seconds(course: Course, seconds: Mapping[str, float]) -> dict[str, float]:
    """How much of each exchange is hidden each time that it runs; those of which something is.

    Args:
      course: of the program.
      seconds: that each exchange takes each time, by the name of its operation.
    """
    found: dict[str, float] = {}
    for computation in course.module.computations.values():
        found |= _hidden_in(course, computation, seconds)
    return found


def _hidden_in(
    course: Course, computation: Computation, seconds: Mapping[str, float]
) -> dict[str, float]:
    """Of exchanges that begin in a computation."""
    begun: dict[str, list[str]] = {}  # Those on their way, by the key of their end.
    left: dict[str, float] = {}
    hidden: dict[str, float] = {}
    for op in computation.ops.values():
        for key in _ended_by(course.module, op):
            for name in begun.pop(key, ()):
                del left[name]
        spare = course.seconds(op) if left else 0.0
        for name in list(left):
            taken = min(spare, left[name])
            hidden[name] = hidden.get(name, 0.0) + taken
            left[name], spare = left[name] - taken, spare - taken
        for key, names in _begun_by(course.module, op).items():
            known = [name for name in names if name in seconds]
            begun[key] = known
            left |= {name: seconds[name] for name in known}
    return {name: taken for name, taken in hidden.items() if taken}


def _begun_by(module: Module, op: Op) -> dict[str, list[str]]:
    """Exchanges that an operation begins, by a key that `_ended_by` gives for their end."""
    if collective_kind(op) is not None:
        is_begun = op.opcode.endswith("-start") or op.opcode == "send"
        return {op.name: [op.name]} if is_begun else {}
    if op.opcode == "async-start":
        inner = module.called(op)[0].ops.values()
        return {op.name: [other.name for other in inner if collective_kind(other) is not None]}
    return {channel: [other.name] for channel, other in _cut_into_pieces(module, op, START)}


def _ended_by(module: Module, op: Op) -> list[str]:
    if op.opcode.endswith("-done"):
        return list(op.operands)
    return [channel for channel, _ in _cut_into_pieces(module, op, DONE)]


def _cut_into_pieces(module: Module, op: Op, target: str) -> list[tuple[str, Op]]:
    """Collectives in a fusion that begins or ends them, with their channels."""
    if op.opcode != "fusion":
        return []
    inner = module.called(op)[0].ops.values()
    if not any(other.target == target for other in inner):
        return []
    return [
        (f"channel {other.number('channel_id')}", other)
        for other in inner
        if collective_kind(other) is not None
    ]
