"""The ONNX form of functions, loops, branches and random draws; and the table of all rules."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.random import threefry_prng_impl

from megatransformer_jax.config.option import ConfigError
from megatransformer_jax.export.onnx_graph import (
    Rule,
    Scope,
    Value,
    constant_value,
    shape_of,
    type_of,
)
from megatransformer_jax.export.onnx_ops import ARRAY_RULES, slice_axes, traced

_BOOL, _LONG, _UNSIGNED = (np.dtype(name) for name in ("bool", "int64", "uint32"))

# ------------------------------------------------------------------------------
# Functions and control flow.


def _inlined(name: str) -> Rule:
    def rule(scope: Scope, equation: Any, *given: Value) -> list[Value]:
        inner = equation.params[name]
        return (
            scope.run(inner, given)
            if hasattr(inner, "consts")
            else scope.evaluate(inner, [], given)
        )

    return rule


def _while(scope: Scope, equation: Any, *given: Value) -> list[Value]:
    params = equation.params
    num_cond, num_body = params["cond_nconsts"], params["body_nconsts"]
    of_cond, of_body = given[:num_cond], given[num_cond : num_cond + num_body]
    first = given[num_cond + num_body :]
    goes_on = scope.run(params["cond_jaxpr"], [*of_cond, *first])[0]
    body = scope.inner()
    carry = [Value(value.shape, value.dtype, scope.names.new("carry")) for value in first]
    names = scope.names.new("turn"), scope.names.new("goes_on")
    new = body.run(params["body_jaxpr"], [*of_body, *carry])
    again = body.run(params["cond_jaxpr"], [*of_cond, *new])[0]
    inputs = [Value((), _LONG, names[0]), Value((), _BOOL, names[1]), *carry]
    graph = body.graph("body", inputs, [again, *new])
    outputs = [(value.shape, value.dtype) for value in first]
    return scope.add_several("Loop", [None, goes_on, *first], outputs, body=graph)


def _scan(scope: Scope, equation: Any, *given: Value) -> list[Value]:
    params = equation.params
    num_consts, num_carry, length = params["num_consts"], params["num_carry"], params["length"]
    consts, first = given[:num_consts], given[num_consts : num_consts + num_carry]
    rows = given[num_consts + num_carry :]
    body = scope.inner()
    turn = Value((), _LONG, scope.names.new("turn"))
    goes_on = Value((), _BOOL, scope.names.new("goes_on"))
    carry = [Value(value.shape, value.dtype, scope.names.new("carry")) for value in first]
    place = turn
    if params["reverse"]:
        place = body.elementwise("Sub", constant_value(np.int64(length - 1)), turn)
    taken = [body.add("Gather", [row, place], row.shape[1:], row.dtype, axis=0) for row in rows]
    found = body.run(params["jaxpr"], [*consts, *carry, *taken])
    graph = body.graph("body", [turn, goes_on, *carry], [constant_value(np.bool_(True)), *found])
    outputs = [(shape_of(v), type_of(v)) for v in equation.outvars]
    trips = constant_value(np.int64(length))
    results = scope.add_several("Loop", [trips, None, *first], outputs, body=graph)
    if not params["reverse"]:
        return results
    cuts = {0: (-1, np.iinfo(np.int64).min, -1)}
    stacked = [slice_axes(scope, value, cuts, value.shape) for value in results[num_carry:]]
    return [*results[:num_carry], *stacked]


def _cond(scope: Scope, equation: Any, which: Value, *given: Value) -> list[Value]:
    branches = equation.params["branches"]
    if len(branches) != 2:
        raise ConfigError("format", "onnx has no choice among several branches; use stablehlo.")
    graphs = []
    for branch in branches:
        inner = scope.inner()
        graphs.append(inner.graph("branch", [], inner.run(branch, given)))
    outputs = [(shape_of(variable), type_of(variable)) for variable in equation.outvars]
    condition = scope.cast(which, _BOOL)
    return scope.add_several(
        "If", [condition], outputs, else_branch=graphs[0], then_branch=graphs[1]
    )


# ------------------------------------------------------------------------------
# Random numbers: Threefry's rounds, so that draws are those of JAX.

_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))


def _threefry(
    key_0: jax.Array, key_1: jax.Array, x_0: jax.Array, x_1: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Threefry-2x32 with 20 rounds (Salmon et al. 2011)."""
    keys = (key_0, key_1, key_0 ^ key_1 ^ jnp.uint32(0x1BD11BDA))
    x_0, x_1 = x_0 + keys[0], x_1 + keys[1]
    for group in range(5):
        for rotation in _ROTATIONS[group % 2]:
            x_0 = x_0 + x_1
            x_1 = (x_1 << jnp.uint32(rotation)) | (x_1 >> jnp.uint32(32 - rotation))
            x_1 = x_0 ^ x_1
        x_0 = x_0 + keys[(group + 1) % 3]
        x_1 = x_1 + keys[(group + 2) % 3] + jnp.uint32(group + 1)
    return x_0, x_1


def _over_keys(function: Callable[..., Any], num_axes: int) -> Callable[..., Any]:
    for _ in range(num_axes):
        function = jax.vmap(function)
    return function


def _random_seed(scope: Scope, equation: Any, seeds: Value) -> list[Value]:
    return scope.trace(_over_keys(threefry_prng_impl.seed, len(seeds.shape)), seeds)


def _random_fold_in(scope: Scope, equation: Any, keys: Value, data: Value) -> list[Value]:
    shape = equation.outvars[0].aval.shape

    def fold_all(keys: jax.Array, data: jax.Array) -> jax.Array:
        keys, data = jnp.broadcast_to(keys, (*shape, 2)), jnp.broadcast_to(data, shape)
        folded: jax.Array = _over_keys(threefry_prng_impl.fold_in, len(shape))(keys, data)
        return folded

    return scope.trace(fold_all, keys, scope.cast(data, _UNSIGNED))


def _random_bits(scope: Scope, equation: Any, keys: Value) -> list[Value]:
    width, shape = equation.params["bit_width"], equation.params["shape"]

    def draw(key: jax.Array) -> jax.Array:
        return threefry_prng_impl.random_bits(key, width, shape)

    return scope.trace(_over_keys(draw, len(keys.shape) - 1), keys)


def _counts(scope: Scope, equation: Any) -> list[Value]:
    """The counters of draws: high and low words of 0, 1, 2 and so on."""
    shape = equation.params["shape"]
    low = np.arange(math.prod(shape), dtype=np.uint32).reshape(shape)
    return [constant_value(np.zeros_like(low)), constant_value(low)]


def _same(scope: Scope, equation: Any, keys: Value) -> Value:
    return keys


RULES: dict[str, Rule] = {
    **ARRAY_RULES,
    **dict.fromkeys(("jit", "pjit", "closed_call", "remat", "checkpoint"), _inlined("jaxpr")),
    "custom_jvp_call": _inlined("call_jaxpr"),
    "custom_vjp_call": _inlined("call_jaxpr"),
    "while": _while,
    "scan": _scan,
    "cond": _cond,
    "threefry2x32": traced(_threefry),
    "iota_2x32_shape": _counts,
    "random_seed": _random_seed,
    "random_fold_in": _random_fold_in,
    "random_bits": _random_bits,
    **dict.fromkeys(("random_wrap", "random_unwrap"), _same),
}
