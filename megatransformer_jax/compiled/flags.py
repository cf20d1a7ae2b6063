"""Copies of arrays, and what a program should not do.

Arguments are told apart by their names, which JAX hands to the compiler: weights have 'params' in
them, such as `state.params['core']['qkv']`, and a key/value cache has 'cache'.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from megatransformer_jax.compiled.course import Course, Visit
from megatransformer_jax.compiled.hlo import HBM, Module, Op, Shape
from megatransformer_jax.compiled.reading import Collective, Copy, Flag

# Kind -> what is wrong with it.
FLAGS = {
    "gradient-in-loop": "Gradients of weights are reduced in a loop, where once after it would do.",
    "all-reduced-gradient": (
        "Gradients of weights that are cut over the devices are all-reduced whole; "
        "a reduce-scatter would send half as much."
    ),
    "resharding-in-loop": "The partitioner moves arrays between devices in a loop.",
    "copied-argument": "Arguments (weights, optimiser state, caches) are copied.",
    "converted-weights": "Weights are converted to another type in each call.",
    "float32-on-wire": "float32 is sent although the program computes in bfloat16.",
}
MIB = 2**20
MIN_COPY = MIB
# Copies below this share of the memory, or of the cache, are not worth a flag; nor are gradients in
# a loop below this share of what is sent, such as those of vectors.
NEGLIGIBLE = 0.01
# The same for float32 among all that is sent.
_FEW_FLOATS = 0.05
_BACKWARD = "transpose("
_MOVES = {"parameter", "bitcast", "copy", "transpose", "convert", "reshape", "tuple", "constant"}


class Exchange(NamedTuple):
    """A collective with the operation that it was read from.

    Attributes:
      op: the operation.
      collective: what was read from it.
      in_loop: it stands in a loop of the program. The loops in which the compiler multiplies
        matrices while it exchanges their parts are not among them.
    """

    op: Op
    collective: Collective
    in_loop: bool


# ------------------------------------------------------------------------------
# Copies.


def find_copies(course: Course, visits: Iterable[Visit]) -> list[Copy]:
    """Copies of at least 1 MiB from or to main memory, most bytes in one call first.

    What is only fetched to memory on the chip, or put back, in the same layout, is left out.
    """
    module = course.module
    results = _aliased_results(module)
    found = []
    for visit in visits:
        op = visit.op
        if visit.is_fused or not _is_move(module, op):
            continue
        from_op = module.computations[op.computation].operands(op)[0]
        to, before = op.shapes[0], from_op.shapes[0]
        in_hbm = (before.memory, to.memory).count(HBM)
        is_moved_only = (to.dtype, to.minor_to_major) == (before.dtype, before.minor_to_major)
        if to.padded_bytes < MIN_COPY or in_hbm < (2 if is_moved_only else 1):
            continue
        found.append(
            Copy(
                name=op.name,
                kind="copy" if to.dtype == before.dtype else "conversion",
                shape=str(to),
                num_bytes=to.padded_bytes,
                of=_argument_of(module, from_op) or results.get(op.name, ""),
                loop=module.body(visit.loop).name if visit.loop else None,
                times=visit.times,
                source=op.source or module.origin(op).source,
            )
        )
    return sorted(found, key=lambda copy: -copy.times * copy.num_bytes)


def _is_move(module: Module, op: Op) -> bool:
    if op.opcode in ("copy", "copy-start", "transpose", "convert"):
        return True
    if op.opcode != "fusion" or len(set(op.operands)) != 1:
        return False
    inner = module.called(op)[0].ops.values()
    return all(other.opcode in _MOVES for other in inner) and any(
        other.opcode in ("copy", "transpose", "convert") for other in inner
    )


def _argument_of(module: Module, op: Op) -> str:
    """The name of the argument that a value is, moved at most; empty for any other value."""
    for _ in range(10):
        op = module.origin(op)
        if op.opcode == "parameter":
            return op.source if op.computation == module.entry else ""
        if not _is_move(module, op):
            return ""
        op = module.computations[op.computation].operands(op)[0]
    return ""


def _aliased_results(module: Module) -> dict[str, str]:
    """Operations that make a result -> the name of the donated argument that it replaces."""
    root = module.main.ops[module.main.root]
    makers = root.operands if root.opcode == "tuple" else (root.name,)
    named = {}
    for leaf, number in re.findall(r"\{(\d*)\}: \((\d+), \{\}", module.header):
        place = int(leaf or 0)
        argument = module.main.parameters.get(int(number))
        if place >= len(makers) or argument is None:
            continue
        op = module.main.ops[makers[place]]
        while op.opcode in ("bitcast", "copy-done") and (first := module.main.operand(op)):
            op = first
        named[op.name] = argument.source
    return named


# ------------------------------------------------------------------------------
# Flags.


def find_flags(
    course: Course, exchanges: Sequence[Exchange], copies: Sequence[Copy]
) -> tuple[Flag, ...]:
    """Everything that `FLAGS` names, most bytes in one call first."""
    found = [
        *_gradient_flags(course.module, exchanges),
        *_resharding_flags(exchanges),
        *_copy_flags(course, copies),
        *_float_flags(course.module, exchanges),
    ]
    return tuple(sorted(found, key=lambda flag: -flag.num_bytes))


def _flag(kind: str, items: Sequence[tuple[str, float, str]]) -> Iterator[Flag]:
    """One flag for (name, bytes, place) of all operations of a kind, if there are any."""
    if items:
        total = sum(num_bytes for _, num_bytes, _ in items)
        largest = max(items, key=lambda item: item[1])
        text = (
            f"{FLAGS[kind]} {total / MIB:.4g} MiB per call in {len(items)} "
            f"{'operation' if len(items) == 1 else 'operations'}, the largest {largest[2]}."
        )
        yield Flag(kind, text, total, tuple(name for name, _, _ in items))


def _place(collective: Collective) -> str:
    where = "outside of loops" if collective.loop is None else f"{collective.times} times in a loop"
    article = "an" if collective.kind[0] == "a" else "a"
    dims = ",".join(map(str, collective.shape))
    return (
        f"{article} {collective.kind} of {collective.dtype}[{dims}] over "
        f"{' x '.join(collective.axes) or 'devices'}, {where}"
        + (f" ({collective.source})" if collective.source else "")
    )


def _gradient_flags(module: Module, exchanges: Sequence[Exchange]) -> Iterator[Flag]:
    weights = [
        op.shapes[0].dims
        for op in module.main.parameters.values()
        if "params" in op.source and op.shapes
    ]
    repeated, whole = [], []
    for op, collective, in_loop in exchanges:
        is_backward = _BACKWARD in collective.source or not collective.source
        if collective.kind not in ("all-reduce", "reduce-scatter") or not is_backward:
            continue
        computation = module.computations[op.computation]
        sent = [shape for operand in computation.operands(op) for shape in operand.shapes]
        gradients = [
            (shape, cuts) for shape in sent if (cuts := _cuts(shape, weights, collective.times))
        ]
        share = sum(shape.num_bytes for shape, _ in gradients) / max(1, collective.logical_bytes)
        item = (collective.name, share * collective.total_wire_bytes, _place(collective))
        if gradients and in_loop and collective.times > 1:
            repeated.append(item)
        cut = [shape for shape, cuts in gradients if cuts > 1 and collective.group_size % cuts == 0]
        if cut and collective.kind == "all-reduce":
            share = sum(shape.num_bytes for shape in cut) / max(1, collective.logical_bytes)
            whole.append((item[0], share * collective.total_wire_bytes, item[2]))
    everything = sum(collective.total_wire_bytes for _, collective, _ in exchanges)
    if sum(size for _, size, _ in repeated) >= NEGLIGIBLE * everything:
        yield from _flag("gradient-in-loop", repeated)
    yield from _flag("all-reduced-gradient", whole)


def _cuts(shape: Shape, weights: Iterable[tuple[int, ...]], times: int) -> int:
    """How many devices share a weight of this shape; 0 if no weight has this shape.

    Args:
      shape: of what is reduced.
      weights: shapes of one device's parts of all weights.
      times: that it is reduced in one call.
    """
    whole, parts = sorted(dim for dim in shape.dims if dim > 1), 0
    for weight in weights:
        # In a loop over stacked layers, the gradient is that of one of them. More turns than layers
        # are iterations.
        candidates = [weight, weight[1:]] if weight and times > weight[0] else [weight]
        for candidate in candidates:
            own = sorted(dim for dim in candidate if dim > 1)
            if whole and (own == whole or _is_merged(shape.dims, candidate)):
                return 1
            parts = max(parts, _ratio(whole, own))
    return parts


def _is_merged(dims: Sequence[int], weight: Sequence[int]) -> bool:
    """Whether these are a weight's extents with neighbours multiplied: programs for GPUs do so."""
    remaining = [dim for dim in weight if dim > 1]
    for dim in dims:
        while remaining and dim > 1 and dim % remaining[0] == 0:
            dim //= remaining.pop(0)
        if dim > 1:
            return False
    return not remaining


def _ratio(whole: list[int], own: list[int]) -> int:
    """How many times the one extent in which these differ is larger; 0 if they differ in more."""
    remaining = list(own)
    unmatched = []
    for dim in whole:
        if dim in remaining:
            remaining.remove(dim)
        else:
            unmatched.append(dim)
    if len(unmatched) != 1 or len(remaining) != 1 or unmatched[0] % remaining[0]:
        return 0
    return unmatched[0] // remaining[0]


def _resharding_flags(exchanges: Sequence[Exchange]) -> Iterator[Flag]:
    """Moves that the program asked for by name are left out."""
    items = [
        (collective.name, collective.total_wire_bytes, _place(collective))
        for _, collective, in_loop in exchanges
        if collective.kind in ("all-to-all", "ragged-all-to-all", "collective-permute") and in_loop
        if collective.source.rsplit("/", 1)[-1] not in ("ppermute", "all_to_all")
    ]
    yield from _flag("resharding-in-loop", items)


def _copy_flags(course: Course, copies: Sequence[Copy]) -> Iterator[Flag]:
    memory = NEGLIGIBLE * course.chip.hbm_bytes
    module = course.module
    cache = sum(
        op.num_bytes for op in module.main.parameters.values() if "cache" in op.source.lower()
    )

    def items(kind: str, is_meant: bool | None) -> list[tuple[str, float, str]]:
        return [
            (copy.name, float(copy.times * copy.num_bytes), f"{copy.shape} of {copy.of}")
            for copy in copies
            if copy.kind == kind and copy.of
            if is_meant is None or ("cache" in copy.of.lower()) == is_meant
        ]

    cached, others = items("copy", True), items("copy", False)
    copied = []
    if sum(size for _, size, _ in cached) > min(memory, NEGLIGIBLE * cache):
        copied += cached
    if sum(size for _, size, _ in others) > memory:
        copied += others
    yield from _flag("copied-argument", copied)
    # A train step holds its weights in another type on purpose.
    is_training = any(
        _BACKWARD in op.source
        for computation in module.computations.values()
        for op in computation.ops.values()
    )
    converted = [item for item in items("conversion", None) if "params" in item[2]]
    if not is_training and sum(size for _, size, _ in converted) > memory:
        yield from _flag("converted-weights", converted)


def _float_flags(module: Module, exchanges: Sequence[Exchange]) -> Iterator[Flag]:
    products = {
        computation.ops[op.operands[0]].shapes[0].dtype
        for computation in module.computations.values()
        for op in computation.ops.values()
        if op.opcode in ("dot", "convolution")
    }
    everything = sum(collective.total_wire_bytes for _, collective, _ in exchanges)
    items = [
        (collective.name, collective.total_wire_bytes, _place(collective))
        for _, collective, _ in exchanges
        if collective.dtype == "f32"
    ]
    sent = sum(size for _, size, _ in items)
    if "bf16" in products and sent >= max(MIB, _FEW_FLOATS * everything):
        yield from _flag("float32-on-wire", items)
