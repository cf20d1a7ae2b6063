"""The ONNX form of every operation on arrays that a pass is traced to, one rule each.

A rule takes the scope, the equation and its inputs, and returns what the equation does. Types that
onnxruntime computes with are float32, int32, int64 and bool; a rule casts where JAX has another.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from megatransformer_jax.config.option import ConfigError
from megatransformer_jax.export.onnx_graph import (
    Rule,
    Scope,
    Value,
    broadcast,
    constant_value,
    shape_of,
    type_of,
)

_BOOL, _INT, _LONG, _FLOAT = (np.dtype(name) for name in ("bool", "int32", "int64", "float32"))
_UNSIGNED = np.dtype(np.uint32)


def out_of(equation: Any) -> tuple[tuple[int, ...], np.dtype]:
    """Shape and type of an equation's only result."""
    return shape_of(equation.outvars[0]), type_of(equation.outvars[0])


# ------------------------------------------------------------------------------
# Elementwise.


def _unary(kind: str) -> Rule:
    return lambda scope, equation, x: scope.elementwise(kind, x)


def _arithmetic(kind: str, **attributes: Any) -> Rule:
    def rule(scope: Scope, equation: Any, x: Value, y: Value) -> Value:
        if x.dtype == _UNSIGNED:  # Wraps when it is cast back.
            x, y = scope.cast(x, _LONG), scope.cast(y, _LONG)
        return scope.cast(scope.elementwise(kind, x, y, **attributes), out_of(equation)[1])

    return rule


def _extreme(kind: str, logical: str) -> Rule:
    def rule(scope: Scope, equation: Any, x: Value, y: Value) -> Value:
        return scope.elementwise(logical if x.dtype == _BOOL else kind, x, y)

    return rule


def _comparison(kind: str, is_negated: bool = False) -> Rule:
    def rule(scope: Scope, equation: Any, x: Value, y: Value) -> Value:
        if x.dtype == _UNSIGNED:
            x, y = scope.cast(x, _LONG), scope.cast(y, _LONG)
        found = scope.elementwise(kind, x, y, dtype=_BOOL)
        return scope.elementwise("Not", found) if is_negated else found

    return rule


def _logical(of_bools: str, of_bits: str) -> Rule:
    return lambda scope, equation, *given: scope.elementwise(
        of_bools if given[0].dtype == _BOOL else of_bits, *given
    )


def _shift(direction: str) -> Rule:
    def rule(scope: Scope, equation: Any, x: Value, y: Value) -> Value:
        if x.dtype != _UNSIGNED:
            x, y = scope.cast(x, _UNSIGNED), scope.cast(y, _UNSIGNED)
        shifts = y.small.constant
        if shifts is not None and np.all(shifts >= 32):  # Nothing is left; not so in C.
            return broadcast(constant_value(np.zeros((1,) * len(x.shape), x.dtype)), x.shape)
        found = scope.elementwise("BitShift", x, y, direction=direction)
        return scope.cast(found, out_of(equation)[1])

    return rule


def _arithmetic_shift(scope: Scope, equation: Any, x: Value, y: Value) -> Value:
    """Whole numbers divided by a power of two, rounded down."""
    if y.small.constant is None:
        raise ConfigError("format", "onnx shifts signed numbers by constants alone; use stablehlo.")
    power = constant_value(2 ** y.small.constant.astype(np.int32))
    wide = scope.cast(x, _INT)
    low = scope.elementwise("Mod", wide, power)
    found = scope.elementwise("Div", scope.elementwise("Sub", wide, low), power)
    return scope.cast(found, x.dtype)


def _select(scope: Scope, equation: Any, which: Value, *cases: Value) -> Value:
    if len(cases) != 2:
        raise ConfigError("format", "onnx has no choice among several arrays here; use stablehlo.")
    otherwise, then = cases
    which = scope.cast(which, _BOOL)
    dtype = then.dtype
    if dtype == _BOOL:
        both = scope.elementwise("And", which, then)
        other = scope.elementwise("And", scope.elementwise("Not", which), otherwise)
        return scope.elementwise("Or", both, other)
    if dtype == _UNSIGNED:
        then, otherwise = scope.cast(then, _LONG), scope.cast(otherwise, _LONG)
    found = scope.elementwise("Where", which, then, otherwise, dtype=then.dtype)
    return scope.cast(found, dtype)


def traced(function: Callable[..., Any]) -> Rule:
    """An operation that ONNX lacks, as a function of those it has."""
    return lambda scope, equation, *given: scope.trace(function, *given)


def _log1p(x: jax.Array) -> jax.Array:
    # Exact but for rounding, where 1 + x alone would lose x (Kahan).
    total = 1.0 + x
    gap = total - 1.0
    return jnp.where(gap == 0, x, jnp.log(total) * x / jnp.where(gap == 0, 1.0, gap))


def _expm1(x: jax.Array) -> jax.Array:
    # tanh keeps small values: exp(x) - 1 = tanh(x / 2) (exp(x) + 1).
    return jnp.tanh(x / 2) * (jnp.exp(x) + 1.0)


def _erf_inv(x: jax.Array) -> jax.Array:
    """Giles' polynomials, as XLA has them."""
    w = -_log1p(-x * x)
    small = (
        *(2.81022636e-08, 3.43273939e-07, -3.5233877e-06, -4.39150654e-06, 0.00021858087),
        *(-0.00125372503, -0.00417768164, 0.246640727, 1.50140941),
    )
    large = (
        *(-0.000200214257, 0.000100950558, 0.00134934322, -0.00367342844, 0.00573950773),
        *(-0.0076224613, 0.00943887047, 1.00167406, 2.83297682),
    )
    is_small = w < 5.0
    w = jnp.where(is_small, w - 2.5, jnp.sqrt(w) - 3.0)
    found = jnp.where(is_small, small[0], large[0])
    for near, far in zip(small[1:], large[1:], strict=True):
        found = jnp.where(is_small, near, far) + found * w
    return jnp.where(jnp.abs(x) == 1.0, x * jnp.inf, found * x)


def _is_finite(scope: Scope, equation: Any, x: Value) -> Value:
    # Infinity and NaN have a difference from themselves that is not 0.
    gap = scope.elementwise("Sub", x, x)
    zero = constant_value(np.zeros((), x.dtype))
    return scope.elementwise("Equal", gap, zero, dtype=_BOOL)


def _integer_pow(scope: Scope, equation: Any, x: Value) -> Value:
    exponent = equation.params["y"]
    power = constant_value(np.asarray(abs(exponent), x.dtype))
    found = (
        scope.elementwise("Mul", x, x) if abs(exponent) == 2 else scope.elementwise("Pow", x, power)
    )
    return scope.elementwise("Reciprocal", found) if exponent < 0 else found


def _bitcast(scope: Scope, equation: Any, x: Value) -> Value:
    """The float32 of the same bits, for numbers that are neither denormal, infinite nor NaN."""
    if (x.dtype, out_of(equation)[1]) != (_UNSIGNED, _FLOAT):
        raise ConfigError("format", f"onnx reads no bits of {x.dtype} here; use stablehlo.")
    powers = np.concatenate([[0.0], 2.0 ** np.arange(-126.0, 128.0), [np.inf]]).astype(np.float32)

    def numbers(bits: jax.Array) -> jax.Array:
        mantissa = (bits & 0x7FFFFF).astype(jnp.float32) * 2.0**-23
        exponent = ((bits >> 23) & 0xFF).astype(jnp.int32)
        sign = 1.0 - 2.0 * (bits >> 31).astype(jnp.float32)
        return sign * (1.0 + mantissa) * jnp.take(powers, exponent, mode="clip")

    return scope.trace(numbers, x)[0]


# ------------------------------------------------------------------------------
# Shapes.


def _broadcast_in_dim(scope: Scope, equation: Any, x: Value, *dynamic: Value) -> Value:
    shape, _ = out_of(equation)
    axes = equation.params["broadcast_dimensions"]
    axes = [*axes, len(shape) - 1][: len(x.shape)]  # Of keys also the axis of their two words.
    small = x.small
    compact = [1] * len(shape)
    for axis, size in zip(axes, small.shape, strict=True):
        compact[axis] = size
    return broadcast(scope.reshape(small, compact), shape)


def _reshape(scope: Scope, equation: Any, x: Value, *dynamic: Value) -> Value:
    shape, _ = out_of(equation)
    # Without axes of 1 the same: what is compact stays so.
    small = x.small
    if small is not x and [n for n in x.shape if n > 1] == [n for n in shape if n > 1]:
        sizes = [own for own, size in zip(small.shape, x.shape, strict=True) if size > 1]
        compact = [1 if size == 1 else sizes.pop(0) for size in shape]
        return broadcast(scope.reshape(small, compact), shape)
    return scope.reshape(x, shape)


def _transpose(scope: Scope, equation: Any, x: Value) -> Value:
    shape, dtype = out_of(equation)
    order = [*equation.params["permutation"], len(shape) - 1][: len(shape)]
    small = x.small
    moved = [small.shape[axis] for axis in order]
    if [axis for axis in order if small.shape[axis] > 1] == sorted(
        axis for axis in order if small.shape[axis] > 1
    ):
        return broadcast(scope.reshape(small, moved), shape)
    return broadcast(scope.add("Transpose", [small], moved, dtype, perm=order), shape)


def _iota(scope: Scope, equation: Any) -> Value:
    shape, dtype = out_of(equation)
    axis = equation.params["dimension"]
    numbers = np.arange(shape[axis]).astype(dtype)
    compact = [size if place == axis else 1 for place, size in enumerate(shape)]
    return broadcast(constant_value(numbers.reshape(compact)), shape)


def _long(*numbers: int) -> np.ndarray:
    return np.asarray(numbers, np.int64)


def slice_axes(
    scope: Scope, x: Value, cuts: dict[int, tuple[int, int, int]], shape: Sequence[int]
) -> Value:
    """x[..., start:end:stride, ...] of the axes that are cut."""
    if not cuts:
        return x
    starts, ends, strides = (_long(*part) for part in zip(*cuts.values(), strict=True))
    return scope.add("Slice", [x, starts, ends, _long(*cuts), strides], shape, x.dtype)


def _slice(scope: Scope, equation: Any, x: Value) -> Value:
    params = equation.params
    strides = params["strides"] or (1,) * len(x.shape)
    cuts = {
        axis: cut
        for axis, cut in enumerate(
            zip(params["start_indices"], params["limit_indices"], strides, strict=True)
        )
        if cut != (0, x.shape[axis], 1)
    }
    return slice_axes(scope, x, cuts, out_of(equation)[0])


def _rev(scope: Scope, equation: Any, x: Value) -> Value:
    least = np.iinfo(np.int64).min
    cuts = {axis: (-1, least, -1) for axis in equation.params["dimensions"]}
    return slice_axes(scope, x, cuts, x.shape)


def _concatenate(scope: Scope, equation: Any, *parts: Value) -> Value:
    shape, dtype = out_of(equation)
    return scope.add("Concat", parts, shape, dtype, axis=equation.params["dimension"])


def _stack(scope: Scope, equation: Any, *parts: Value) -> Value:
    shape, dtype = out_of(equation)
    axis = equation.params["axis"]
    parts_shape = [1 if place == axis else size for place, size in enumerate(shape)]
    whole = [scope.reshape(part, parts_shape) for part in parts]
    return scope.add("Concat", whole, shape, dtype, axis=axis)


def _split(scope: Scope, equation: Any, x: Value) -> list[Value]:
    sizes = _long(*equation.params["sizes"])
    outputs = [(shape_of(variable), x.dtype) for variable in equation.outvars]
    return scope.add_several("Split", [x, sizes], outputs, axis=equation.params["axis"])


def _tile(scope: Scope, equation: Any, x: Value) -> Value:
    shape, dtype = out_of(equation)
    return scope.add("Tile", [x, _long(*equation.params["reps"])], shape, dtype)


def _pad(scope: Scope, equation: Any, x: Value, fill: Value) -> Value:
    shape, dtype = out_of(equation)
    config = equation.params["padding_config"]
    if (
        any(between for _, _, between in config)
        or min(min(low, high) for low, high, _ in config) < 0
    ):
        raise ConfigError("format", "onnx pads at the ends alone; use format='stablehlo'.")
    pads = _long(*(low for low, _, _ in config), *(high for _, high, _ in config))
    return scope.add("Pad", [x, pads, fill], shape, dtype)


# ------------------------------------------------------------------------------
# Reductions.


def _reduction(kind: str) -> Rule:
    def rule(scope: Scope, equation: Any, x: Value) -> Value:
        shape, _ = out_of(equation)
        axes = equation.params["axes"]
        kept = [1 if axis in axes else size for axis, size in enumerate(x.shape)]
        # Most results are broadcast along these axes again.
        return scope.reshape(scope.add(kind, [x, _long(*axes)], kept, x.dtype, keepdims=1), shape)

    return rule


def _reduce_bools(kind: str) -> Rule:
    def rule(scope: Scope, equation: Any, x: Value) -> Value:
        found = _reduction(kind)(scope, equation, scope.cast(x, _INT))
        return scope.cast(found, _BOOL)

    return rule


def _argument(kind: str) -> Rule:
    def rule(scope: Scope, equation: Any, x: Value) -> Value:
        shape, dtype = out_of(equation)
        (axis,) = equation.params["axes"]
        return scope.cast(scope.add(kind, [x], shape, _LONG, axis=axis, keepdims=0), dtype)

    return rule


def _cumsum(scope: Scope, equation: Any, x: Value) -> Value:
    shape, dtype = out_of(equation)
    axis = np.asarray(equation.params["axis"], np.int64)
    return scope.add("CumSum", [x, axis], shape, dtype, reverse=int(equation.params["reverse"]))


def _top_k(scope: Scope, equation: Any, x: Value) -> list[Value]:
    outputs = [shape_of(variable) for variable in equation.outvars]
    values, places = scope.add_several(
        "TopK", [x, _long(equation.params["k"])], [(outputs[0], x.dtype), (outputs[1], _LONG)]
    )
    return [values, scope.cast(places, _INT)]


# ------------------------------------------------------------------------------
# Products.


def _dot_general(scope: Scope, equation: Any, left: Value, right: Value) -> Value:
    shape, dtype = out_of(equation)
    (left_sum, right_sum), (left_batch, right_batch) = equation.params["dimension_numbers"]
    left_free = [a for a in range(len(left.shape)) if a not in (*left_sum, *left_batch)]
    right_free = [a for a in range(len(right.shape)) if a not in (*right_sum, *right_batch)]
    is_plain = len(right.shape) == 2 and left.dtype == right.dtype == dtype and not left_batch
    if is_plain and (*left_sum, *right_sum) == (len(left.shape) - 1, 0):
        return scope.add("MatMul", [left, right], shape, dtype)
    batch = [left.shape[axis] for axis in left_batch]
    inner = math.prod(left.shape[axis] for axis in left_sum)
    rows = math.prod(left.shape[axis] for axis in left_free)
    columns = math.prod(right.shape[axis] for axis in right_free)
    left = _ordered(scope, left, [*left_batch, *left_free, *left_sum], [*batch, rows, inner])
    right = _ordered(
        scope, right, [*right_batch, *right_sum, *right_free], [*batch, inner, columns]
    )
    kind = "MatMul"
    if left.dtype == right.dtype == np.int8:
        kind = "MatMulInteger"
    elif left.dtype != dtype:
        left, right = scope.cast(left, dtype), scope.cast(right, dtype)
    return scope.reshape(scope.add(kind, [left, right], [*batch, rows, columns], dtype), shape)


def _ordered(scope: Scope, x: Value, order: Sequence[int], shape: Sequence[int]) -> Value:
    if list(order) != list(range(len(order))):
        moved = [x.shape[axis] for axis in order]
        x = scope.add("Transpose", [x], moved, x.dtype, perm=list(order))
    return scope.reshape(x, shape)


# ------------------------------------------------------------------------------
# Indices.


def _clamped(scope: Scope, start: Value, most: int) -> Value:
    """Where a cut really starts, int64 [1]."""
    if start.constant is not None:
        return constant_value(_long(int(np.clip(start.constant, 0, most))))
    start = scope.reshape(scope.cast(start, _LONG), (1,))
    start = scope.elementwise("Max", start, constant_value(_long(0)))
    return scope.elementwise("Min", start, constant_value(_long(most)))


def _dynamic_slice(scope: Scope, equation: Any, x: Value, *starts: Value) -> Value:
    sizes = equation.params["slice_sizes"]
    for axis, (start, size) in enumerate(zip(starts, sizes, strict=True)):
        if size == x.shape[axis]:
            continue
        begin = _clamped(scope, start, x.shape[axis] - size)
        end = scope.elementwise("Add", begin, constant_value(_long(size)))
        shape = [*x.shape[:axis], size, *x.shape[axis + 1 :]]
        x = scope.add("Slice", [x, begin, end, _long(axis)], shape, x.dtype)
    return x


def _dynamic_update_slice(
    scope: Scope, equation: Any, x: Value, new: Value, *starts: Value
) -> Value:
    cut = [axis for axis in range(len(x.shape)) if new.shape[axis] != x.shape[axis]]
    if not cut:
        return new
    if len(cut) > 1:
        # The rows of the first axis that change, with the change in them.
        axis, *_ = cut
        sizes = [*x.shape[:axis], new.shape[axis], *x.shape[axis + 1 :]]
        zeros = [constant_value(np.int32(0))] * len(x.shape)
        begin = _clamped(scope, starts[axis], x.shape[axis] - sizes[axis])
        end = scope.elementwise("Add", begin, constant_value(_long(sizes[axis])))
        inner = scope.add("Slice", [x, begin, end, _long(axis)], sizes, x.dtype)
        others = [zeros[0] if place == axis else start for place, start in enumerate(starts)]
        new = _dynamic_update_slice(scope, equation, inner, new, *others)
    axis = cut[0]
    begin = _clamped(scope, starts[axis], x.shape[axis] - new.shape[axis])
    end = scope.elementwise("Add", begin, constant_value(_long(new.shape[axis])))
    # Their sizes are data; shapes are only notes of ours.
    before = scope.add("Slice", [x, _long(0), begin, _long(axis)], x.shape, x.dtype)
    behind = scope.add("Slice", [x, end, _long(x.shape[axis]), _long(axis)], x.shape, x.dtype)
    return scope.add("Concat", [before, new, behind], x.shape, x.dtype, axis=axis)


def _gather(scope: Scope, equation: Any, x: Value, indices: Value) -> Value:
    params, numbers = equation.params, equation.params["dimension_numbers"]
    shape, dtype = out_of(equation)
    indexed, batching = list(numbers.start_index_map), list(numbers.operand_batching_dims)
    sizes = params["slice_sizes"]
    rest = [axis for axis in range(len(x.shape)) if axis not in (*indexed, *batching)]
    is_plain = set(numbers.collapsed_slice_dims) == set(indexed)
    if not is_plain or any(sizes[axis] != x.shape[axis] for axis in rest):
        raise ConfigError("format", "onnx gathers whole rows alone; use format='stablehlo'.")
    x = _ordered(
        scope, x, [*batching, *indexed, *rest], [x.shape[a] for a in (*batching, *indexed, *rest)]
    )
    # Axes of indices: those of batches first, the index vector last.
    of_batch = list(numbers.start_indices_batching_dims)
    others = [axis for axis in range(len(indices.shape) - 1) if axis not in of_batch]
    order = [*of_batch, *others, len(indices.shape) - 1]
    indices = _ordered(scope, indices, order, [indices.shape[axis] for axis in order])
    limits = np.asarray([x.shape[len(batching) + n] - 1 for n in range(len(indexed))], np.int64)
    indices = scope.cast(indices, _LONG)
    inside = scope.elementwise("Max", indices, constant_value(np.zeros_like(limits)))
    inside = scope.elementwise("Min", inside, constant_value(limits))
    batch_shape = [*indices.shape[:-1]]
    found_shape = [*batch_shape, *x.shape[len(batching) + len(indexed) :]]
    if len(indexed) == 1 and not batching:
        flat = scope.reshape(inside, batch_shape)
        found = scope.add("Gather", [x, flat], found_shape, dtype, axis=0)
    else:
        found = scope.add("GatherND", [x, inside], found_shape, dtype, batch_dims=len(batching))
    if params["mode"] == jax.lax.GatherScatterMode.FILL_OR_DROP:
        found = _filled(scope, found, indices, inside, params["fill_value"], len(batch_shape))
    # The batch's axes go where no offset is, in the order that they had among the indices.
    places = [axis for axis in range(len(shape)) if axis not in numbers.offset_dims]
    target = dict(zip([*of_batch, *others], range(len(batch_shape)), strict=True))
    source = {place: target[axis] for place, axis in zip(places, sorted(target), strict=True)}
    for number, place in enumerate(numbers.offset_dims):
        source[place] = len(batch_shape) + number
    return _ordered(scope, found, [source[axis] for axis in range(len(shape))], shape)


def _filled(
    scope: Scope, found: Value, indices: Value, inside: Value, fill: Any, num_batch: int
) -> Value:
    """What was gathered, with another number where the index is out of bounds."""
    if fill is None:
        fill = np.nan if found.dtype.kind == "f" else np.iinfo(found.dtype).min
    same = scope.elementwise("Equal", indices, inside, dtype=_BOOL)
    is_inside = scope.add(
        "ReduceMin",
        [scope.cast(same, _INT), _long(num_batch)],
        indices.shape[:-1],
        _INT,
        keepdims=0,
    )
    wide = [*indices.shape[:-1], *(1,) * (len(found.shape) - num_batch)]
    which = scope.reshape(scope.cast(is_inside, _BOOL), wide)
    other = constant_value(np.asarray(fill, found.dtype))
    return scope.elementwise("Where", which, found, other, dtype=found.dtype)


# ------------------------------------------------------------------------------
# The table.


def _same(scope: Scope, equation: Any, *given: Value) -> list[Value]:
    return list(given)


ARRAY_RULES: dict[str, Rule] = {
    **{
        name: _arithmetic(kind) for name, kind in {"add": "Add", "sub": "Sub", "mul": "Mul"}.items()
    },
    "div": _arithmetic("Div"),
    "rem": _arithmetic("Mod", fmod=1),
    "max": _extreme("Max", "Or"),
    "min": _extreme("Min", "And"),
    "pow": lambda scope, equation, x, y: scope.elementwise("Pow", x, y),
    "add_any": _arithmetic("Add"),
    **{
        name: _unary(kind)
        for name, kind in {
            **{"neg": "Neg", "exp": "Exp", "log": "Log", "sqrt": "Sqrt", "tanh": "Tanh"},
            **{"sin": "Sin", "cos": "Cos", "abs": "Abs", "sign": "Sign", "erf": "Erf"},
            **{"floor": "Floor", "ceil": "Ceil", "round": "Round", "logistic": "Sigmoid"},
        }.items()
    },
    "square": lambda scope, equation, x: scope.elementwise("Mul", x, x),
    "rsqrt": lambda scope, equation, x: scope.elementwise(
        "Reciprocal", scope.elementwise("Sqrt", x)
    ),
    "integer_pow": _integer_pow,
    "log1p": traced(_log1p),
    "expm1": traced(_expm1),
    "erf_inv": traced(_erf_inv),
    "exp2": traced(lambda x: jnp.exp(x * math.log(2.0))),
    "erfc": traced(lambda x: 1.0 - jax.lax.erf(x)),
    "is_finite": _is_finite,
    "clamp": lambda scope, equation, low, x, high: scope.elementwise(
        "Min", scope.elementwise("Max", x, low), high
    ),
    "eq": _comparison("Equal"),
    "ne": _comparison("Equal", is_negated=True),
    "lt": _comparison("Less"),
    "le": _comparison("LessOrEqual"),
    "gt": _comparison("Greater"),
    "ge": _comparison("GreaterOrEqual"),
    "and": _logical("And", "BitwiseAnd"),
    "or": _logical("Or", "BitwiseOr"),
    "xor": _logical("Xor", "BitwiseXor"),
    "not": _logical("Not", "BitwiseNot"),
    "shift_left": _shift("LEFT"),
    "shift_right_logical": _shift("RIGHT"),
    "shift_right_arithmetic": _arithmetic_shift,
    "select_n": _select,
    "convert_element_type": lambda scope, equation, x: scope.cast(x, out_of(equation)[1]),
    "bitcast_convert_type": _bitcast,
    "broadcast_in_dim": _broadcast_in_dim,
    **dict.fromkeys(("reshape", "squeeze", "expand_dims"), _reshape),
    "transpose": _transpose,
    "iota": _iota,
    "slice": _slice,
    "rev": _rev,
    "concatenate": _concatenate,
    "stack": _stack,
    "split": _split,
    "tile": _tile,
    "pad": _pad,
    **{
        f"reduce_{name}": _reduction(f"Reduce{name.capitalize()}")
        for name in ("sum", "max", "min", "prod")
    },
    "reduce_or": _reduce_bools("ReduceMax"),
    "reduce_and": _reduce_bools("ReduceMin"),
    "argmax": _argument("ArgMax"),
    "argmin": _argument("ArgMin"),
    "cumsum": _cumsum,
    "top_k": _top_k,
    "dot_general": _dot_general,
    "dynamic_slice": _dynamic_slice,
    "dynamic_update_slice": _dynamic_update_slice,
    "gather": _gather,
    **dict.fromkeys(
        (
            *("stop_gradient", "copy", "copy_p"),
            *("optimization_barrier", "sharding_constraint", "reduce_precision"),
        ),
        _same,
    ),
}
