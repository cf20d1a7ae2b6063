"""What one operation costs: floating-point operations, and bytes between chip and main memory.

FLOPs are those of matrix products, which TPU programs write as convolutions and GPU programs as
calls of cuBLAS, and of attention kernels. Bytes are those that operands and results have in main
memory, padded to tiles. Of an array that an operation only cuts or fills in a part of, the part is
counted. What stands in memory on the chip costs nothing, but copies to and from there do.
"""

import functools
import math
import re
from collections.abc import Iterable, Sequence

import numpy as np

from megatransformer_jax.compiled.collectives import KINDS
from megatransformer_jax.compiled.hlo import HBM, Computation, Module, Op, Shape

# ------------------------------------------------------------------------------
# FLOPs of matrix products.

_CUBLAS, _CUDNN_ATTENTION = "__cublas$", "__cudnn$fmha"


def product_flops(computation: Computation, op: Op) -> float:
    """Of a `dot`, a `convolution` or a call of cuBLAS; 0 for any other operation."""
    is_cublas = op.target.startswith(_CUBLAS)
    if op.opcode not in ("dot", "convolution") and not is_cublas:
        return 0.0
    sides = [computation.ops[name].shapes[0] for name in op.operands[:2]]
    if is_cublas:
        listed = re.search(r'"lhs_contracting_dimensions":\s*\[([^\]]*)\]', op.attributes)
        dims = re.findall(r"\d+", listed.group(1)) if listed else []
        return 2.0 * op.shapes[0].elements * math.prod(sides[0].dims[int(dim)] for dim in dims)
    if op.opcode == "dot":
        contracted = op.numbers("lhs_contracting_dims")
        return 2.0 * op.shapes[0].elements * math.prod(sides[0].dims[dim] for dim in contracted)
    return _convolution_flops(op, op.shapes[0], *sides)


def _convolution_flops(op: Op, output: Shape, lhs: Shape, kernel: Shape) -> float:
    """FLOPs, without the positions of the window that fall into padding or between elements."""
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", op.attributes)
    if labels is None:
        return 0.0
    of_lhs, of_kernel, of_output = labels.groups()
    window = re.search(r"window=\{([^}]*)\}", op.attributes)
    settings = window.group(1) if window else ""
    dims = sum(label.isdigit() for label in of_kernel)
    size, stride, dilation, spread = (
        _per_dim(settings, key, dims, "1") for key in ("size", "stride", "lhs_dilate", "rhs_dilate")
    )
    padding = _per_dim(settings, "pad", dims, "0_0")
    pairs = 1
    for dim in range(dims):
        pairs *= _window_pairs(
            lhs.dims[of_lhs.index(str(dim))],
            output.dims[of_output.index(str(dim))],
            int(size[dim]),
            (int(stride[dim]), int(dilation[dim]), int(spread[dim])),
            int(padding[dim].split("_")[0]),
        )
    outputs = output.dims[of_output.index("b")] * output.dims[of_output.index("f")]
    return 2.0 * outputs * kernel.dims[of_kernel.index("i")] * pairs


def _per_dim(settings: str, key: str, dims: int, default: str) -> list[str]:
    found = re.search(rf"(?:^| ){key}=([\dx_\-]+)", settings)
    return found.group(1).split("x") if found else [default] * dims


@functools.lru_cache(maxsize=4096)
def _window_pairs(
    length: int, outputs: int, size: int, steps: tuple[int, int, int], padding: int
) -> int:
    """Pairs of an output's place and a window's place that meet an element of the input."""
    stride, dilation, spread = steps
    places = np.arange(outputs)[:, None] * stride - padding
    pairs = 0
    for start in range(0, size, 1024):  # Windows can be as long as a row.
        at = places + np.arange(start, min(size, start + 1024)) * spread
        pairs += int(((at >= 0) & (at <= (length - 1) * dilation) & (at % dilation == 0)).sum())
    return pairs


# ------------------------------------------------------------------------------
# FLOPs of kernels.

_KERNEL_TARGETS = ("tpu_custom_call", "mosaic_gpu")
# Products per tile of attention weights. The backward passes compute the weights again.
_SPLASH_PRODUCTS = {"fwd": 2, "dq": 3, "dkv": 4}
_LARGEST_TILE = 512
_CUDNN_FORWARD_PRODUCTS, _CUDNN_BACKWARD_PRODUCTS = 2, 5


def is_kernel(op: Op) -> bool:
    """Whether an operation is a kernel that was written by hand."""
    return op.target in _KERNEL_TARGETS or op.target.startswith(_CUDNN_ATTENTION)


def kernel_flops(module: Module, op: Op) -> float:
    """Of attention kernels; 0 for any other kernel.

    Splash attention skips tiles of which all is masked, and computes those that are masked in part
    as a whole. cuDNN's kernel skips what its own causal mask covers; a mask that it is given as an
    array covers nothing.
    """
    if op.target.startswith(_CUDNN_ATTENTION):
        return _cudnn_flops(module, op)
    pass_name = re.search(r"splash_m[hq]a_(fwd|dq|dkv)", f"{op.name} {op.source}")
    if pass_name is None:
        return 0.0
    computation = module.computations[op.computation]
    operands = [computation.ops[name] for name in op.operands]
    arrays = [operand for operand in operands if operand.shapes[0].dtype in ("bf16", "f16", "f32")]
    masks = [operand for operand in operands if operand.shapes[0].dtype == "s8"]
    if len(arrays) < 2:
        return 0.0
    query, key = arrays[0].shapes[0].dims, arrays[1].shapes[0].dims
    flops_per_pair = 2.0 * _SPLASH_PRODUCTS[pass_name.group(1)] * query[-1]
    if len(masks) < 2:  # Nothing is masked but by segments.
        return flops_per_pair * math.prod(query[:-1]) * key[-2]
    grid = masks[1].shapes[0].dims
    rows, keys = _tile(query[-2], grid[-2]), _tile(key[-2], grid[-1])
    # The grid leaves out rows or columns of tiles that nothing needs; tiles are square then.
    pairs = (rows or keys) * (keys or rows) * _computed_tiles(module, masks[1]) / grid[0]
    return flops_per_pair * math.prod(query[:-2]) * pairs


def _cudnn_flops(module: Module, op: Op) -> float:
    """Queries and keys are [B, T, N, H], as JAX calls the kernel."""
    operands = [module.computations[op.computation].ops[name] for name in op.operands[:2]]
    (rows, queries, heads, width), keys = operands[0].shapes[0].dims, operands[1].shapes[0].dims[1]
    is_backward = op.target.endswith("Backward")
    products = _CUDNN_BACKWARD_PRODUCTS if is_backward else _CUDNN_FORWARD_PRODUCTS
    pairs = float(rows * heads * queries * keys)
    if re.search(r'"mask_type":\s*"(PADDING_)?CAUSAL"', op.attributes):
        pairs *= (queries + 1) / (2 * queries)
    return 2.0 * products * pairs * width


def _tile(length: int, count: int) -> int:
    """The side of a tile; 0 if the grid is not whole."""
    side, rest = divmod(length, count)
    return side if not rest and side <= _LARGEST_TILE else 0


def _computed_tiles(module: Module, mask: Op) -> float:
    """Tiles of the grid that are not skipped, those of all heads that have their own mask."""
    origin, total = module.origin(mask), mask.shapes[0].elements
    if origin.opcode == "constant" and "..." not in origin.literal:
        kinds = re.findall(r"\d+", origin.literal)
        return sum(kind != "0" for kind in kinds) if len(kinds) == total else total
    if origin.opcode == "broadcast":
        return total
    # Not printed: causal.
    rows = mask.shapes[0].dims[-2]
    return total * (rows + 1) / (2 * rows)


# ------------------------------------------------------------------------------
# Bytes.

# Operations that move nothing, or whose called computations are counted instead.
_FREE = {
    "parameter",
    "constant",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "while",
    "conditional",
    "call",
    "after-all",
    "partition-id",
    "replica-id",
    "optimization-barrier",
    "async-start",
    "async-update",
    "async-done",
    "send",
    "recv",
}
_FREE_TARGETS = {"AllocateBuffer", "ConcatBitcast", "AssumeGatherIndicesInBound", "SliceId"}
_CUTTING = {"dynamic-slice", "slice", "gather"}


def hbm_bytes(module: Module, op: Op) -> float:
    """Read and written by one operation that stands outside of fusions."""
    if op.opcode in _FREE or op.opcode.endswith("-done") or op.target in _FREE_TARGETS:
        return 0.0
    computation = module.computations[op.computation]
    operands = computation.operands(op)
    if op.opcode == "fusion":
        return _fusion_bytes(module, op, operands)
    if op.opcode == "copy-start":
        return _in_hbm(op.shapes[:2])
    if op.opcode in ("slice-start", "dynamic-slice-start"):
        return _in_hbm(op.shapes[1:2]) + _part(operands[0], op.shapes[1])
    if op.opcode in _CUTTING:
        return _in_hbm(op.shapes) + _part(operands[0], op.shapes[0]) + _read(operands[1:])
    if op.opcode == "dynamic-update-slice":
        update = computation.ops[op.operands[1]]
        return _read([update]) + _part(op, update.shapes[0])
    if op.opcode == "scatter":
        updates = computation.ops[op.operands[-1]]
        return 2 * _part(op, updates.shapes[0]) + _read(operands[1:])
    return _in_hbm(_results(op)) + _read(operands)


def _results(op: Op) -> Sequence[Shape]:
    """What an operation makes; without the room to work in that a library is given."""
    if op.target.startswith((_CUBLAS, _CUDNN_ATTENTION)):
        return [shape for shape in op.shapes if shape.dtype not in ("s8", "u8")]
    return op.shapes


def _in_hbm(shapes: Iterable[Shape]) -> float:
    return float(sum(shape.padded_bytes for shape in shapes if shape.memory == HBM))


def _read(operands: Iterable[Op]) -> float:
    return sum(_in_hbm(operand.shapes) for operand in operands)


def _part(whole: Op, part: Shape) -> float:
    """Bytes of a part of an array, if that is in main memory."""
    return float(part.num_bytes) if whole.shapes[0].memory == HBM else 0.0


def _fusion_bytes(module: Module, op: Op, operands: Sequence[Op]) -> float:
    inner = module.called(op)[0]
    moved, filled = _written(inner, op)
    by_name = {operand.name: operand for operand in operands}
    numbers: dict[str, list[int]] = {}
    for number, name in enumerate(op.operands):
        numbers.setdefault(name, []).append(number)
    for name, places in numbers.items():
        operand = by_name.get(name)
        if operand is None or operand.shapes[0].memory != HBM:
            continue
        whole = _in_hbm(operand.shapes)
        parts = [
            _read_of_parameter(module, inner.parameters[place], filled)
            for place in places
            if place in inner.parameters
        ]
        moved += whole if None in parts else min(whole, sum(part or 0.0 for part in parts))
    return moved


def _written(inner: Computation, op: Op) -> tuple[float, set[str]]:
    """Bytes that a fusion writes, and the parameters that it fills in place."""
    root = inner.ops[inner.root]
    results = inner.operands(root) if root.opcode == "tuple" else [root]
    if len(results) != len(op.shapes):
        return _in_hbm(op.shapes), set()
    moved, filled = 0.0, set()
    for result, shape in zip(results, op.shapes, strict=True):
        made = _without_bitcasts(inner, result)
        if made.opcode == "dynamic-update-slice":
            filled.add(_without_bitcasts(inner, inner.ops[made.operands[0]]).name)
            update = inner.ops[made.operands[1]].shapes[0]
            moved += update.num_bytes if shape.memory == HBM else 0.0
        elif made.opcode not in ("parameter", *KINDS):  # Pieces of an exchange are handed on.
            moved += _in_hbm([shape])
    return moved, filled


def _read_of_parameter(module: Module, parameter: Op, filled: set[str]) -> float | None:
    """Bytes of a parameter that a fusion reads; None for all of it."""
    inner = module.computations[parameter.computation]
    read, following = 0.0, [parameter]
    while following:
        op = following.pop()
        for user in inner.users[op.name]:
            part = _read_by(module, user, op, parameter.name in filled)
            if part is None:
                return None
            read += part
            if user.opcode == "bitcast":
                following.append(user)
    return read


def _read_by(module: Module, user: Op, op: Op, is_filled: bool) -> float | None:
    if user.opcode in ("bitcast", "tuple", *KINDS):
        return 0.0
    if user.opcode in _CUTTING and user.operands[0] == op.name:
        return float(user.shapes[0].num_bytes)
    if user.opcode == "dynamic-update-slice" and user.operands[0] == op.name and is_filled:
        return 0.0
    if user.opcode == "fusion" and user.operands.count(op.name) == 1:
        called = module.called(user)[0]
        return _read_of_parameter(module, called.parameters[user.operands.index(op.name)], set())
    return None


def _without_bitcasts(inner: Computation, op: Op) -> Op:
    while op.opcode == "bitcast" and (first := inner.operand(op)) is not None:
        op = first
    return op
