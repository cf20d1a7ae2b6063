"""From a jaxpr to an ONNX graph: values, scopes, and what evaluates a jaxpr in them.

Why not a library: jax2onnx, the only one, pins orbax-checkpoint below what the base install needs,
so no environment can hold both. A traced pass of ours has about 70 kinds of operations.

What keeps graphs small: constants are computed here. A broadcast stays a small value for as long as
only elementwise operations read it, because ONNX broadcasts by itself. A change of shape has a node
only if somebody reads it in that shape. Nodes whose results nobody reads are dropped.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import onnx
from jax.extend import core as jax_core
from onnx import helper

from megatransformer_jax.config.option import ConfigError

OPSET = 23
# Constants of more numbers are not computed here, but by operations of the graph.
MAX_FOLDED = 1 << 16
_KEY_TYPE = np.dtype(np.uint32)


@dataclasses.dataclass(eq=False)
class Value:
    """An array in the graph.

    Attributes:
      shape: of the array.
      dtype: of the array.
      name: of the node output, graph input or initialiser that is the array; '' if it is only known
        as a constant or as something to be broadcast.
      constant: the numbers, where they are known.
      compact: a value of the same rank that broadcasts to this one.
      view: a value with the same numbers in another shape.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    name: str = ""
    constant: np.ndarray | None = None
    compact: "Value | None" = None
    view: "Value | None" = None

    @property
    def small(self) -> "Value":
        """The value, or what broadcasts to it."""
        return self if self.compact is None else self.compact


def constant_value(array: Any) -> Value:
    """A constant."""
    array = np.asarray(array)
    return Value(array.shape, array.dtype, constant=array)


# (scope, equation, inputs) -> what the equation does, or a list of that.
Rule = Callable[..., Any]


class Names:
    """What all scopes of a model share: rules, names, and initialisers for constants.

    Args:
      rules: by the name of an operation.
    """

    def __init__(self, rules: Mapping[str, Rule]) -> None:
        self.rules = rules
        self._count = 0
        self._of_constants: dict[tuple[Any, ...], str] = {}
        self.initializers: list[onnx.TensorProto] = []

    def new(self, hint: str) -> str:
        """A name that nothing has yet."""
        self._count += 1
        return f"{hint}_{self._count}"

    def of_constant(self, array: np.ndarray) -> str:
        """The initialiser with these numbers."""
        array = np.ascontiguousarray(array).reshape(array.shape)
        key = (array.shape, array.dtype.str, array.tobytes())
        if key not in self._of_constants:
            self._of_constants[key] = self.new("constant")
            tensor = onnx.numpy_helper.from_array(array, self._of_constants[key])
            self.initializers.append(tensor)
        return self._of_constants[key]


class Scope:
    """A graph while it is built: the main one, or the body of a loop or of a branch.

    Attributes:
      names: of the whole model.
      nodes: in an order in which they can run.
    """

    def __init__(self, names: Names, parent: "Scope | None" = None):
        self.names = names
        self.nodes: list[onnx.NodeProto] = []
        self._parent = parent
        self._named: dict[int, tuple[Value, str]] = {}

    # --------------------------------------------------------------------------
    # Nodes.

    def inner(self) -> "Scope":
        """A scope that sees everything of this one."""
        return Scope(self.names, self)

    def name(self, value: Value) -> str:
        """The value's name; makes an initialiser or broadcasts where there is none yet."""
        if value.name:
            return value.name
        scope: Scope | None = self
        while scope is not None:
            if id(value) in scope._named:
                return scope._named[id(value)][1]
            scope = scope._parent
        source = value.compact or value.view
        if source is not None:
            kind, attributes = ("Expand", {}) if value.compact else ("Reshape", {"allowzero": 1})
            shape = np.asarray(value.shape, np.int64)
            name = self.add(kind, [source, shape], value.shape, value.dtype, **attributes).name
        else:
            assert value.constant is not None
            name = self.names.of_constant(value.constant)
        self._named[id(value)] = (value, name)
        return name

    def add(
        self,
        kind: str,
        inputs: Sequence[Value | np.ndarray | None],
        shape: Sequence[int],
        dtype: Any,
        **attributes: Any,
    ) -> Value:
        """A node with one output."""
        return self.add_several(kind, inputs, [(shape, dtype)], **attributes)[0]

    def add_several(
        self,
        kind: str,
        inputs: Sequence[Value | np.ndarray | None],
        outputs: Sequence[tuple[Sequence[int], Any]],
        **attributes: Any,
    ) -> list[Value]:
        """A node; inputs that are None are left out, arrays become initialisers."""
        given = [
            ""
            if item is None
            else self.name(item if isinstance(item, Value) else constant_value(item))
            for item in inputs
        ]
        names = [self.names.new(kind.lower()) for _ in outputs]
        self.nodes.append(helper.make_node(kind, given, names, **attributes))
        return [
            Value(tuple(shape), np.dtype(dtype), name)
            for name, (shape, dtype) in zip(names, outputs, strict=True)
        ]

    def cast(self, value: Value, dtype: Any) -> Value:
        """The value in another type; broadcasts stay small."""
        dtype = np.dtype(dtype)
        if value.dtype == dtype:
            return value
        small = value.small
        result = self.add("Cast", [small], small.shape, dtype, to=onnx_type(dtype))
        return broadcast(result, value.shape)

    def reshape(self, value: Value, shape: Sequence[int]) -> Value:
        """The value in another shape of the same size; no node before somebody reads it."""
        if value.view is not None:
            value = value.view
        if tuple(shape) == value.shape:
            return value
        if value.constant is not None:
            return constant_value(value.constant.reshape(shape))
        return Value(tuple(shape), value.dtype, view=value)

    def elementwise(self, kind: str, *values: Value, dtype: Any = None, **attributes: Any) -> Value:
        """A node on values that broadcast against each other; the result stays small if it can."""
        full = np.broadcast_shapes(*(value.shape for value in values))
        small = [value.small for value in values]
        shape = np.broadcast_shapes(*(value.shape for value in small))
        result = self.add(kind, small, shape, dtype or values[0].dtype, **attributes)
        return broadcast(result, full)

    def outputs(self, values: Sequence[Value]) -> list[str]:
        """Names of results, each made by a node of this scope, as a body's must be."""
        made = {name for node in self.nodes for name in node.output}
        found: list[str] = []
        for value in values:
            name = self.name(value)
            made |= set(self.nodes[-1].output) if self.nodes else set()
            if name not in made or name in found:
                whole = Value(value.shape, value.dtype, name)
                name = self.add("Identity", [whole], value.shape, value.dtype).name
            found.append(name)
        return found

    def graph(
        self, title: str, inputs: Sequence[Value], outputs: Sequence[Value]
    ) -> onnx.GraphProto:
        """The scope as a graph, without nodes that no output needs."""
        names = self.outputs(outputs)
        self.nodes = live_nodes(self.nodes, names)
        return helper.make_graph(
            self.nodes,
            title,
            [value_info(value.name, value) for value in inputs],
            [value_info(name, value) for name, value in zip(names, outputs, strict=True)],
        )

    # --------------------------------------------------------------------------
    # Jaxprs.

    def run(self, closed: Any, inputs: Sequence[Value]) -> list[Value]:
        """The nodes of a closed jaxpr; returns its results."""
        return self.evaluate(closed.jaxpr, [constant_value(c) for c in closed.consts], inputs)

    def evaluate(self, jaxpr: Any, consts: Sequence[Value], inputs: Sequence[Value]) -> list[Value]:
        """The nodes of a jaxpr; returns its results."""
        known: dict[Any, Value] = {}
        known.update(zip(jaxpr.constvars, consts, strict=True))
        known.update(zip(jaxpr.invars, inputs, strict=True))

        def read(variable: Any) -> Value:
            if isinstance(variable, jax_core.Literal):
                aval: Any = variable.aval
                return constant_value(np.asarray(variable.val, aval.dtype).reshape(aval.shape))
            return known[variable]

        for equation in jaxpr.eqns:
            given = [read(variable) for variable in equation.invars]
            found = _folded(equation, given)
            if found is None:
                found = self._apply(equation, given)
            known.update(zip(equation.outvars, found, strict=True))
        return [read(variable) for variable in jaxpr.outvars]

    def trace(self, function: Callable[..., Any], *inputs: Value) -> list[Value]:
        """The nodes of a function of arrays."""
        shapes = [jax.ShapeDtypeStruct(value.shape, value.dtype) for value in inputs]
        return self.run(jax.make_jaxpr(function)(*shapes), inputs)

    def _apply(self, equation: Any, given: list[Value]) -> list[Value]:
        name, rules = equation.primitive.name, self.names.rules
        if name not in rules:
            where = str(equation.source_info.name_stack) or "the model"
            raise ConfigError(
                "format",
                f"onnx has no form here for the operation {name!r} of {where}; use "
                "format='stablehlo', which can express every model.",
            )
        found = rules[name](self, equation, *given)
        return found if isinstance(found, list) else [found]


# Cheap, and made small by their own rules.
_NOT_FOLDED = {"broadcast_in_dim", "iota", "jit", "while", "scan", "cond"}


def _folded(equation: Any, given: Sequence[Value]) -> list[Value] | None:
    """Results that depend on constants alone, computed now; None for others."""
    sizes = [math.prod(variable.aval.shape) for variable in equation.outvars]
    if equation.primitive.name in _NOT_FOLDED or max(sizes, default=0) > MAX_FOLDED:
        return None
    if any(jax.dtypes.issubdtype(v.aval.dtype, jax.dtypes.prng_key) for v in equation.invars):
        return None
    if any(jax.dtypes.issubdtype(v.aval.dtype, jax.dtypes.prng_key) for v in equation.outvars):
        return None
    constants = [value.constant for value in given]
    if not given or any(constant is None for constant in constants):
        return None
    with jax.ensure_compile_time_eval():
        arrays = [jax.numpy.asarray(constant) for constant in constants]
        found = equation.primitive.bind(*arrays, **equation.params)
    found = found if equation.primitive.multiple_results else [found]
    return [constant_value(array) for array in found]


def broadcast(value: Value, shape: Sequence[int]) -> Value:
    """The value as an array of a shape that it broadcasts to."""
    if value.shape == tuple(shape):
        return value
    return Value(tuple(shape), value.dtype, compact=value)


def shape_of(variable: Any) -> tuple[int, ...]:
    """The shape that a variable has in the graph: keys are two words."""
    is_key = jax.dtypes.issubdtype(variable.aval.dtype, jax.dtypes.prng_key)
    return (*variable.aval.shape, 2) if is_key else variable.aval.shape


def type_of(variable: Any) -> np.dtype:
    """The type that a variable has in the graph."""
    is_key = jax.dtypes.issubdtype(variable.aval.dtype, jax.dtypes.prng_key)
    return _KEY_TYPE if is_key else np.dtype(variable.aval.dtype)


def onnx_type(dtype: Any) -> int:
    """ONNX's number for a type."""
    return helper.np_dtype_to_tensor_dtype(np.dtype(dtype))


def value_info(name: str, value: Value) -> onnx.ValueInfoProto:
    """The declaration of an input or output."""
    return helper.make_tensor_value_info(name, onnx_type(value.dtype), value.shape)


def live_nodes(nodes: Sequence[onnx.NodeProto], outputs: Sequence[str]) -> list[onnx.NodeProto]:
    """Nodes that the outputs need, in their order."""
    needed, kept = set(outputs), []
    for node in reversed(nodes):
        if needed.isdisjoint(node.output):
            continue
        kept.append(node)
        needed |= set(node.input)
        for attribute in node.attribute:
            if attribute.HasField("g"):
                needed |= _free_names(attribute.g)
    return kept[::-1]


def _free_names(graph: onnx.GraphProto) -> set[str]:
    """Names that a body takes from outside, and some of its own."""
    names = {output.name for output in graph.output}
    for node in graph.node:
        names |= set(node.input)
        for attribute in node.attribute:
            if attribute.HasField("g"):
                names |= _free_names(attribute.g)
    return names
