"""Scheduled HLO text as values: computations, operations, shapes with layout and memory space.

`compiled.as_text()` prints what a device executes, in the order in which it executes it. This is
the part of that language that the other files of this folder need; what is not needed is kept as
text. Nothing here needs JAX or a device.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Mapping

from megatransformer_jax.config.option import UserError

# ------------------------------------------------------------------------------
# Shapes.

_SHAPE = re.compile(r"\b([a-z]\w*)\[([\d,<=]*)\](?:\{([^{}]*)\})?")
_TILE = re.compile(r"T\(([\d,]+)\)")
_SPACE = re.compile(r"S\((\d+)\)")
_BITS = re.compile(r"[a-z]+(\d+)")
# Memory spaces of layouts: without S(n) an array is in the device's main memory.
HBM, HOST = 0, 5


@dataclasses.dataclass(frozen=True)
class Shape:
    """An array's type.

    Attributes:
      dtype: as HLO names it, such as 'bf16'.
      dims: its extents.
      minor_to_major: the order of its dimensions in memory, the fastest first.
      tile: extents of the tiles that it is stored in, of the last dimensions in memory; empty for
        none. Bytes are padded to whole tiles.
      memory: 0 is the device's main memory, 5 the host's; others are on the chip.
    """

    dtype: str
    dims: tuple[int, ...]
    minor_to_major: tuple[int, ...] = ()
    tile: tuple[int, ...] = ()
    memory: int = HBM

    @property
    def elements(self) -> int:
        """How many."""
        return math.prod(self.dims)

    @property
    def itemsize(self) -> float:
        """Bytes of an element."""
        if self.dtype == "pred":
            return 1.0
        bits = _BITS.match(self.dtype)
        return int(bits.group(1)) / 8 if bits else 0.0  # A token has no bytes.

    @property
    def num_bytes(self) -> int:
        """Without padding."""
        return math.ceil(self.elements * self.itemsize)

    @functools.cached_property
    def padded_bytes(self) -> int:
        """That it takes in memory."""
        extents = [self.dims[index] for index in self.minor_to_major] or list(self.dims[::-1])
        for place, multiple in enumerate(self.tile[::-1]):
            if place < len(extents):
                extents[place] = -(-extents[place] // multiple) * multiple
        return math.ceil(math.prod(extents) * self.itemsize)

    def __str__(self) -> str:
        dims = ",".join(map(str, self.dims))
        order = ",".join(map(str, self.minor_to_major))
        tile = f":T({','.join(map(str, self.tile))})" if self.tile else ""
        space = f"S({self.memory})" if self.memory else ""
        return f"{self.dtype}[{dims}]{{{order}{tile}{space}}}"


def parse_shapes(text: str) -> tuple[Shape, ...]:
    """All arrays of a type as HLO writes it, those of a tuple in their order."""
    return tuple(_shape(*found.groups()) for found in _SHAPE.finditer(text))


@functools.lru_cache(maxsize=4096)
def _shape(dtype: str, dims: str, layout: str | None) -> Shape:
    order, _, details = (layout or "").partition(":")
    tile, space = _TILE.search(details), _SPACE.search(details)
    return Shape(
        dtype,
        integers(dims.replace("<=", "")),
        integers(order) if order.replace(",", "").isdigit() else (),
        integers(tile.group(1)) if tile else (),
        int(space.group(1)) if space else HBM,
    )


def integers(text: str) -> tuple[int, ...]:
    """Those of a list such as '4,16,'."""
    return tuple(int(number) for number in text.split(",") if number)


# ------------------------------------------------------------------------------
# Operations and computations.


@dataclasses.dataclass(frozen=True)
class Op:
    """One operation.

    Attributes:
      name: unique in the program.
      opcode: such as 'fusion' or 'all-gather-start'.
      type_text: of the result, as it was written.
      operands: names of operations of the same computation.
      literal: what stands in the parentheses: the value of a constant, the number of a parameter.
      attributes: everything behind the parentheses, as text.
      computation: that it stands in.
    """

    name: str
    opcode: str
    type_text: str
    operands: tuple[str, ...]
    literal: str
    attributes: str
    computation: str

    @functools.cached_property
    def shapes(self) -> tuple[Shape, ...]:
        """Of the result; several for a tuple."""
        return parse_shapes(self.type_text)

    @functools.cached_property
    def source(self) -> str:
        """The path of names under which it was traced; empty if the compiler did not keep it."""
        found = re.search(r'op_name="((?:[^"\\]|\\.)*)"', self.attributes)
        return found.group(1).replace("\\'", "'") if found else ""

    @functools.cached_property
    def target(self) -> str:
        """Of a custom call."""
        found = re.search(r'custom_call_target="([^"]*)"', self.attributes)
        return found.group(1) if found else ""

    def named(self, *keys: str) -> tuple[str, ...]:
        """Computations that attributes such as `body=%name` or `calls={%a, %b}` name."""
        names: list[str] = []
        for key in keys:
            for one, several in re.findall(
                rf"\b{key}=(?:%?([\w.\-]+)|\{{([^}}]*)\}})", self.attributes
            ):
                names += [part.strip().lstrip("%") for part in (one or several).split(",")]
        return tuple(filter(None, names))

    def number(self, key: str, default: int = -1) -> int:
        """An attribute such as `index=3`."""
        found = re.search(rf"\b{key}=(-?\d+)", self.attributes)
        return int(found.group(1)) if found else default

    def numbers(self, key: str) -> tuple[int, ...]:
        """An attribute such as `dimensions={0,2}`."""
        found = re.search(rf"\b{key}=\{{([\d,]*)\}}", self.attributes)
        return integers(found.group(1)) if found else ()

    @property
    def num_bytes(self) -> int:
        """Of all arrays of the result, without padding."""
        return sum(shape.num_bytes for shape in self.shapes)


@dataclasses.dataclass(frozen=True)
class Computation:
    """Operations in the order in which they are executed.

    Attributes:
      name: unique in the program.
      ops: by name.
      root: the one whose result is the computation's.
    """

    name: str
    ops: Mapping[str, Op]
    root: str

    def operand(self, op: Op, index: int = 0) -> Op | None:
        """An operand of an operation of this computation."""
        return self.ops.get(op.operands[index]) if index < len(op.operands) else None

    def operands(self, op: Op) -> list[Op]:
        """All operands, each once."""
        return [self.ops[name] for name in dict.fromkeys(op.operands) if name in self.ops]

    @functools.cached_property
    def parameters(self) -> Mapping[int, Op]:
        """By number."""
        return {int(op.literal): op for op in self.ops.values() if op.opcode == "parameter"}

    @functools.cached_property
    def users(self) -> Mapping[str, list[Op]]:
        """Who takes the result of each operation."""
        users: dict[str, list[Op]] = {name: [] for name in self.ops}
        for op in self.ops.values():
            for name in dict.fromkeys(op.operands):
                users.setdefault(name, []).append(op)
        return users


# What executes another computation in a program's course. Reducers (`to_apply` of a reduction) are
# not among them: they run once per element.
_CALLING = {
    "while": ("body", "condition"),
    "fusion": ("calls",),
    "call": ("to_apply",),
    "async-start": ("calls",),
    "conditional": ("branch_computations", "true_computation", "false_computation"),
    "custom-call": ("called_computations",),
}


@dataclasses.dataclass(frozen=True)
class Module:
    """A whole program.

    Attributes:
      computations: by name.
      entry: the name of the one where it starts.
      header: its first line, with aliases of arguments and results.
    """

    computations: Mapping[str, Computation]
    entry: str
    header: str

    @property
    def main(self) -> Computation:
        """Where it starts."""
        return self.computations[self.entry]

    def called(self, op: Op, *keys: str) -> list[Computation]:
        """Computations that an operation executes, all or those under these keys."""
        names = op.named(*(keys or _CALLING.get(op.opcode, ())))
        return [self.computations[name] for name in names if name in self.computations]

    @functools.cached_property
    def callers(self) -> Mapping[str, list[Op]]:
        """Operations that execute a computation."""
        callers: dict[str, list[Op]] = {}
        for computation in self.computations.values():
            for op in computation.ops.values():
                if op.opcode in _CALLING:
                    for called in self.called(op):
                        callers.setdefault(called.name, []).append(op)
        return callers

    def body(self, loop: Op) -> Computation:
        """Of a `while`."""
        return self.called(loop, "body")[0]

    # --------------------------------------------------------------------------
    # Where a value comes from.

    def origin(self, op: Op, leaf: int = 0) -> Op:
        """What made a value that copies, tuples and loops only pass on.

        Args:
          op: an operation.
          leaf: which array of its result.

        Returns:
          An argument of the program, a constant, or any operation that computes.
        """
        for _ in range(1000):
            following = self._before(op, leaf)
            if following is None:
                return op
            op, leaf = following
        return op

    def _before(self, op: Op, leaf: int) -> tuple[Op, int] | None:
        """One step back; None where a value is made."""
        computation = self.computations[op.computation]
        first = computation.operand(op)
        if op.opcode == "get-tuple-element" and first is not None:
            return first, op.number("index")
        if op.opcode in _PASSING and first is not None:
            return first, leaf if op.opcode == "optimization-barrier" else 0
        if op.opcode == "tuple" and leaf < len(op.operands):
            return computation.ops[op.operands[leaf]], 0
        if op.opcode == "while" and first is not None and self.is_invariant(op, leaf):
            return first, leaf
        if op.opcode == "parameter":
            return self._argument(op, leaf)
        return None

    def _argument(self, op: Op, leaf: int) -> tuple[Op, int] | None:
        callers = self.callers.get(op.computation, [])
        if len(callers) != 1:
            return None
        caller, number = callers[0], int(op.literal)
        there = self.computations[caller.computation]
        if caller.opcode == "while":
            first = there.operand(caller)
            return (first, leaf) if first and self.is_invariant(caller, leaf) else None
        if caller.opcode in ("fusion", "call", "async-start"):
            argument = there.operand(caller, number)
            return None if argument is None else (argument, leaf)
        return None

    def is_invariant(self, loop: Op, leaf: int) -> bool:
        """Whether a `while` hands on this array of its tuple as it got it."""
        body = self.body(loop)
        root = body.ops[body.root]
        if root.opcode != "tuple" or leaf >= len(root.operands):
            return False
        op: Op | None = body.ops[root.operands[leaf]]
        while op is not None and op.opcode in _PASSING:
            op = body.operand(op)
        if op is None or op.opcode != "get-tuple-element":
            return False
        first = body.operand(op)
        return first is not None and first.opcode == "parameter" and op.number("index") == leaf

    def constant(self, op: Op, leaf: int = 0) -> int | None:
        """The integer that a value is; None if it is computed or given."""
        origin = self.origin(op, leaf)
        is_integer = re.fullmatch(r"-?\d+", origin.literal)
        return int(origin.literal) if origin.opcode == "constant" and is_integer else None

    # --------------------------------------------------------------------------
    # Loops.

    def trips(self, loop: Op) -> int | None:
        """Turns of a `while`; None if they depend on data."""
        stated = re.search(r'"known_trip_count":\{"n":"?(\d+)', loop.attributes)
        if stated:
            return int(stated.group(1))
        condition = self.called(loop, "condition")[0]
        compared = condition.ops[condition.root]
        sides = condition.operands(compared)
        if compared.opcode != "compare" or len(sides) != 2:
            return None
        counter, bound = sides
        first = condition.operand(counter)
        if counter.opcode != "get-tuple-element" or first is None or first.opcode != "parameter":
            return None
        leaf = counter.number("index")
        start = self.constant(self.computations[loop.computation].ops[loop.operands[0]], leaf)
        last, step = self.constant(bound), self._step(loop, leaf)
        if start is None or last is None or not step:
            return None
        direction = re.search(r"direction=(\w+)", compared.attributes)
        return _turns(start, last, step, direction.group(1) if direction else "")

    def _step(self, loop: Op, leaf: int) -> int | None:
        """What one turn adds to a counter."""
        body = self.body(loop)
        root = body.ops[body.root]
        if root.opcode != "tuple" or leaf >= len(root.operands):
            return None
        added = body.ops[root.operands[leaf]]
        while added.opcode in _PASSING and (first := body.operand(added)):
            added = first
        if added.opcode == "fusion":
            inner = self.called(added)[0]
            added = inner.ops[inner.root]
        if added.opcode != "add":
            return None
        there = self.computations[added.computation]
        steps = [self.constant(operand) for operand in there.operands(added)]
        known = [step for step in steps if step is not None]
        return known[0] if len(known) == 1 else None


_PASSING = {"copy", "copy-done", "copy-start", "bitcast", "reshape", "optimization-barrier"}


def _turns(start: int, last: int, step: int, direction: str) -> int | None:
    if direction in ("LT", "LE") and step > 0:
        return max(0, -(-(last - start + (direction == "LE")) // step))
    if direction in ("GT", "GE") and step < 0:
        return max(0, -(-(start - last + (direction == "GE")) // -step))
    return None


# ------------------------------------------------------------------------------
# Reading the text.

_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$")
_START = re.compile(r"^\s+(?:ROOT )?%?[\w.\-]+ = ")
_OP = re.compile(
    r"^\s+(ROOT )?%?([\w.\-]+) = (\(.*?\) (?=[a-z][\w\-]*\()|\S+ )([a-z][\w\-]*)\((.*)$", re.DOTALL
)
_NAME = re.compile(r"%([\w.\-]+)")
_PARENTHESIS = re.compile(r"[()]")


def parse_hlo(text: str) -> Module:
    """Reads the text of a compiled program.

    Raises:
      UserError: if it is not the text of a scheduled program.
    """
    header, _, _ = text.partition("\n")
    if not header.startswith("HloModule"):
        raise UserError(
            f"the program begins with {header[:40]!r}, not with 'HloModule'; give the text of "
            "`compiled.as_text()`, not that of `lowered.as_text()`."
        )
    if "is_scheduled=true" not in header:
        raise UserError(
            "the program is not scheduled: its header lacks 'is_scheduled=true'. Give the text of "
            "`compiled.as_text()`, which has the order in which operations run."
        )
    computations, entry = {}, ""
    for is_entry, name, lines in _blocks(text):
        computations[name] = _computation(name, lines)
        entry = name if is_entry else entry
    if not entry:
        raise UserError("the program has no computation marked 'ENTRY'; its text is cut off.")
    return Module(computations, entry, header)


def _blocks(text: str) -> Iterator[tuple[bool, str, list[str]]]:
    """Each computation: whether it is the entry, its name, and a text for every operation."""
    head: re.Match[str] | None = None
    lines: list[str] = []
    for line in text.splitlines():
        if head is None:
            head, lines = _HEAD.match(line), []
        elif line == "}":
            yield bool(head.group(1)), head.group(2), lines
            head = None
        elif _START.match(line):
            lines.append(line)
        elif lines:  # Attributes may go over several lines.
            lines[-1] += line


def _computation(name: str, lines: list[str]) -> Computation:
    ops, root = {}, ""
    for line in lines:
        found = _OP.match(line)
        if found is None:
            raise UserError(f"operation {line.strip()[:80]!r} of {name!r} cannot be read.")
        is_root, op_name, type_text, opcode, rest = found.groups()
        end = _closing(rest)
        inside = rest[:end]
        ops[op_name] = Op(
            name=op_name,
            opcode=opcode,
            type_text=type_text.strip(),
            operands=() if opcode in ("constant", "parameter") else tuple(_NAME.findall(inside)),
            literal=inside.strip(),
            attributes=rest[end + 1 :],
            computation=name,
        )
        root = op_name if is_root else root
    return Computation(name, ops, root or next(reversed(ops), ""))


def _closing(text: str) -> int:
    """Where the parenthesis closes that was opened just before."""
    depth = 1
    for found in _PARENTHESIS.finditer(text):
        depth += 1 if found.group() == "(" else -1
        if depth == 0:
            return found.start()
    return len(text)
