"""Exchanges between devices: which axis of the mesh they follow, and how many bytes they send.

Wire bytes are those that one device sends with the best known algorithm on a ring of g devices:
(g-1)/g of the whole array for an all-gather, a reduce-scatter or an all-to-all, twice that for an
all-reduce, all of it for a permute and for what goes to another slice.
"""

import itertools
import math
import re
from collections.abc import Mapping

import numpy as np

from megatransformer_jax.compiled.hlo import Computation, Module, Op, Shape, integers
from megatransformer_jax.compiled.reading import Collective
from megatransformer_jax.config.option import UserError

KINDS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)
# What the TPU compiler calls when it cuts a collective into pieces that it puts into computations.
START, DONE = "AsyncCollectiveStart", "AsyncCollectiveDone"
Groups = tuple[tuple[int, ...], ...]

# ------------------------------------------------------------------------------
# Groups of devices.


_MESH = re.compile(
    r"replica_groups=mesh\[([^\]]*)\]"
    r"(?:, ?device_ids=\(([^()]*(?:\([\d,]*\))?)\))? ?\{([^}]*)\}"
)


def replica_groups(text: str, num_devices: int) -> Groups:
    """Devices that exchange with each other, in any notation of HLO.

    `{{0,1},{2,3}}` lists them. `[2,4]<=[8]` and `[4,2]<=[2,4]T(1,0)` count up, reshape and
    transpose. `mesh['a'=2,'b'=4] {'b'}` names axes of a mesh over the devices, whose order
    `device_ids=([4,2]T(1,0))` may change; `'b':(2)2` is a part of an axis, from the major side:
    after 2, of size 2.

    Args:
      text: the attributes of the operation.
      num_devices: of the program.

    Returns:
      The groups; all devices in one if the text names none.
    """
    if mesh := _MESH.search(text):
        return _mesh_groups(*mesh.groups())
    iota = re.search(r"replica_groups=\[([\d,]+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)", text)
    if iota:
        shape = integers(iota.group(1))
        return _rows(_counted(iota.group(2)).reshape(shape))
    listed = re.search(r"replica_groups=\{((?:\{[\d,]*\},?)*)\}", text)
    groups = tuple(map(integers, re.findall(r"\{([\d,]*)\}", listed.group(1)))) if listed else ()
    return groups or (tuple(range(num_devices)),)


def permuted_pairs(text: str) -> Groups:
    """From whom to whom a permute sends."""
    pairs = re.search(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}", text)
    return tuple(map(integers, re.findall(r"\{([\d,]*)\}", pairs.group(1)))) if pairs else ()


def _counted(text: str) -> np.ndarray:
    """`[2,4]T(1,0)`: 0 to 7 as 2 rows, then transposed."""
    shape, _, order = text.partition("]")
    ids = np.arange(math.prod(dims := integers(shape.strip("[")))).reshape(dims)
    transposed = re.search(r"T\(([\d,]+)\)", order)
    return ids.transpose(integers(transposed.group(1))) if transposed else ids


def _mesh_groups(axes: str, order: str | None, named: str) -> Groups:
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", axes)}
    ids = _counted(order) if order else np.arange(math.prod(sizes.values()))
    parts = {
        name: (int(before), int(size)) if before else (1, sizes[name])
        for name, before, size in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", named)
    }
    shape, grouped = [], []
    for name, size in sizes.items():
        before, inside = parts.get(name, (size, 1))
        shape += [before, inside, size // before // inside]
        if name in parts:
            grouped.append(len(shape) - 2)
    others = [place for place in range(len(shape)) if place not in grouped]
    array = ids.reshape(shape).transpose(others + grouped)
    return _rows(array.reshape(-1, math.prod(shape[place] for place in grouped)))


def _rows(array: np.ndarray) -> Groups:
    return tuple(tuple(map(int, row)) for row in array.reshape(-1, array.shape[-1]))


def slice_mesh(mesh: Mapping[str, int], num_devices: int) -> dict[str, int]:
    """The part of the mesh that a program of so many devices runs on: one slice of several.

    Raises:
      UserError: if the mesh has not the program's devices, or a multiple of them by its first axis.
    """
    first = next(iter(mesh))
    slices, rest = divmod(math.prod(mesh.values()), num_devices)
    if rest or not slices or mesh[first] % slices:
        axes = " x ".join(f"{axis} {size}" for axis, size in mesh.items())
        raise UserError(
            f"the program runs on {num_devices} devices, and the mesh has {axes}; give the mesh "
            "that it was compiled for."
        )
    return {**mesh, first: mesh[first] // slices}


def axes_of(groups: Groups, mesh: Mapping[str, int]) -> tuple[str, ...]:
    """The axes of the mesh along which these groups lie; empty if they follow no axis."""
    ids = np.arange(math.prod(mesh.values())).reshape(tuple(mesh.values()))
    wanted = {frozenset(group) for group in groups}
    axes = [axis for axis, size in mesh.items() if size > 1]
    for count in range(1, len(axes) + 1):
        for chosen in itertools.combinations(axes, count):
            places = [list(mesh).index(axis) for axis in chosen]
            lines = np.moveaxis(ids, places, range(-count, 0))
            lines = lines.reshape(-1, math.prod(mesh[axis] for axis in chosen))
            if wanted <= {frozenset(map(int, line)) for line in lines}:
                return chosen
    return ()


def axes_between(pairs: Groups, mesh: Mapping[str, int]) -> tuple[str, ...]:
    """The axes of the mesh along which a permute moves."""
    if not pairs or max(map(max, pairs)) >= math.prod(mesh.values()):
        return ()
    places = np.array(np.unravel_index(np.array(pairs), tuple(mesh.values())))
    moved = (places[..., 0] != places[..., 1]).any(axis=1)
    return tuple(axis for axis, is_moved in zip(mesh, moved, strict=True) if is_moved)


# ------------------------------------------------------------------------------
# Operations.


def collective_kind(op: Op) -> str | None:
    """What exchange begins with this operation; None if none does."""
    base = op.opcode.removesuffix("-start")
    if base in KINDS and not op.opcode.endswith("-done"):
        return base
    if op.opcode == "send" and "is_host_transfer=true" in op.attributes:
        return "send"
    return None


def repeated_pieces(module: Module) -> frozenset[str]:
    """Names of collectives that are pieces of one which began elsewhere.

    The TPU compiler writes the whole collective again in each computation that it puts a piece
    into. The one that stands with the call that starts it is counted.
    """
    begun, others = set(), {}
    for computation in module.computations.values():
        targets = {op.target for op in computation.ops.values()}
        for op in computation.ops.values():
            if collective_kind(op) is None:
                continue
            if START in targets:
                begun.add(op.number("channel_id"))
            else:
                others[op.name] = op.number("channel_id")
    return frozenset(name for name, channel in others.items() if channel in begun and channel >= 0)


def read_collective(
    module: Module,
    op: Op,
    mesh: Mapping[str, int],
    linked: int | None,
    loop: str | None,
    times: int,
) -> Collective:
    """Describes an operation for which `collective_kind` knows a kind.

    Args:
      module: the program.
      op: the operation.
      mesh: of the devices of this program; see `slice_mesh`.
      linked: see `Chip`.
      loop: that it stands in.
      times: that it runs in one call.
    """
    computation = module.computations[op.computation]
    kind = collective_kind(op) or ""
    if kind == "all-reduce" and _is_cut_at_once(module, op):
        kind = "reduce-scatter"
    sent = [shape for operand in computation.operands(op) for shape in operand.shapes]
    if kind == "send":
        sent = list(op.shapes[:1])
    received = list(op.shapes)
    if op.opcode.endswith("-start") and len(received) > len(sent):
        received = received[len(sent) : 2 * len(sent)]
    whole = received if kind == "all-gather" else sent
    if kind in ("collective-permute", "send"):
        groups = permuted_pairs(op.attributes)
        axes, size = axes_between(groups, mesh), 2
    else:
        groups = replica_groups(op.attributes, math.prod(mesh.values()))
        axes, size = axes_of(groups, mesh), len(groups[0])
    logical = sum(shape.num_bytes for shape in whole)
    largest = max(whole, key=lambda shape: shape.num_bytes, default=Shape("token", ()))
    return Collective(
        name=op.name,
        kind=kind,
        axes=axes,
        group_size=size,
        dtype=largest.dtype,
        shape=largest.dims,
        logical_bytes=logical,
        wire_bytes=logical * _sent_share(kind, size),
        loop=loop,
        times=times,
        is_async=_is_async(module, op),
        is_between_slices=kind == "send" or _leaves_machine(groups, linked),
        source=op.source or _source_nearby(module, computation),
    )


def _sent_share(kind: str, size: int) -> float:
    if kind in ("collective-permute", "send"):
        return 1.0
    return (2 if kind == "all-reduce" else 1) * (size - 1) / size


def _is_cut_at_once(module: Module, op: Op) -> bool:
    """Whether only the device's own part of an all-reduce's result leaves its fusion."""
    computation = module.computations[op.computation]
    callers = module.callers.get(computation.name, [])
    opcodes = {other.opcode for other in computation.ops.values()}
    if not any(caller.opcode == "fusion" for caller in callers) or "partition-id" not in opcodes:
        return False
    following = [op]
    while following:
        for user in computation.users[following.pop().name]:
            if user.opcode in ("get-tuple-element", "bitcast"):
                following.append(user)
            elif user.opcode != "dynamic-slice":
                return False
    return computation.root != op.name


def _leaves_machine(groups: Groups, linked: int | None) -> bool:
    return linked is not None and any(
        len({device // linked for device in group}) > 1 for group in groups
    )


def _is_async(module: Module, op: Op) -> bool:
    if re.search(r'"is_sync":\s*true', op.attributes):  # How GPU programs write the others.
        return False
    begins = op.opcode.endswith("-start") or op.opcode == "send"
    return begins or _is_begun(module, module.computations[op.computation])


def _is_begun(module: Module, computation: Computation) -> bool:
    if any(op.target == START for op in computation.ops.values()):
        return True
    callers = module.callers.get(computation.name, [])
    return any(caller.opcode == "async-start" for caller in callers)


def _source_nearby(module: Module, computation: Computation) -> str:
    """Of what the compiler made a collective for, if it kept no name for it."""
    ops = [*module.callers.get(computation.name, []), *computation.ops.values()]
    for op in ops:
        there = module.computations[op.computation]
        for other in (op, *there.operands(op)):
            if other.source:
                return other.source
    return ""
