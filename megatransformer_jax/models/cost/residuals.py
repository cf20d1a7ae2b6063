"""What a backward pass needs of its forward pass, read off a trace on abstract arrays.

JAX's own linearisation says which values the backward pass reads, whatever the architecture. A
compiler keeps fewer: what is cheap to compute again from values that are kept anyway (sums, casts,
activations) is fused into what reads it. Inside a loop nothing of the kind happens, as each
iteration writes all of its values into one long array.
"""

import dataclasses
import heapq
import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
from jax.extend import core

# Longer than any other loop of a model, so that the trace tells it apart; nothing is allocated.
LOOP_LENGTH = 1009
# Equations whose results are stored. All others are computed again by whatever reads them.
_STORED = (
    "concatenate",
    "cond",
    "conv_general_dilated",
    "cum",
    "custom",
    "dot",
    "gather",
    "pallas_call",
    "random",
    "reduce_",
    "scan",
    "scatter",
    "sort",
    "threefry",
    "top_k",
    "while",
)
# What goes into these is stored too: no product and no loop starts from values in the making.
_READ_STORED = ("conv_general_dilated", "dot", "pallas_call", "scan", "while")
# Equations that do nothing but call a function.
_CALLS = (
    "checkpoint",
    "closed_call",
    "core_call",
    "custom_jvp",
    "custom_vjp",
    "jit",
    "pjit",
    "remat",
)


@dataclasses.dataclass(frozen=True)
class KeptBytes:
    """Bytes that a forward pass hands to its backward pass, without its arguments.

    Attributes:
      once: kept outside of the loop of `LOOP_LENGTH` iterations.
      per_iteration: kept in each of its iterations.
      one_iteration: the fewest bytes that a single iteration is differentiated from.
    """

    once: int
    per_iteration: int
    one_iteration: int


def kept_bytes(
    function: Callable[..., Any], params: Any, *arguments: Any, fuses: bool = True
) -> KeptBytes:
    """Traces a forward pass and estimates what is kept for the gradients by its first argument.

    Args:
      function: pure; a loop of `LOOP_LENGTH` iterations in it is counted apart.
      params: arrays or `jax.ShapeDtypeStruct`s, as are all others.
      *arguments: the function's other arguments.
      fuses: whether the compiler computes again what is cheap; CPU's does so little that it is left
        out there.
    """

    def residuals(params: Any, *arguments: Any) -> list[Any]:
        backward = jax.vjp(lambda params: function(params, *arguments), params)[1]
        return jax.tree.leaves(backward)  # The function is a pytree of what it keeps.

    traced = jax.make_jaxpr(residuals)(params, *arguments).jaxpr
    values = _Values()
    wanted = values.add(traced, [values.given() for _ in traced.invars])
    kept = values.made({value for value in wanted if value is not None})
    return values.sum(values.fewest(kept) if fuses else kept)


@dataclasses.dataclass(frozen=True)
class _Value:
    """One array of a trace: how large it is and what it comes from. `made_by` is None of what the
    function was given."""

    size: int
    made_by: str | None
    inputs: tuple[int, ...]
    is_stacked: bool


class _Values:
    """The values of a trace in the order in which they are made, calls of functions laid out."""

    def __init__(self) -> None:
        self._values: list[_Value] = []
        self._is_read_stored: set[int] = set()
        self._one_iteration = 0

    def given(self) -> int:
        """A value that is there anyway."""
        return self._new(0, None, (), False)

    def add(self, jaxpr: core.Jaxpr, given: list[int | None]) -> list[int | None]:
        """The numbers of the outputs of a function of `given`; None stands for a constant."""
        names: dict[Any, int | None] = dict(zip(jaxpr.invars, given, strict=True))
        names |= {constant: None for constant in jaxpr.constvars}
        for equation in jaxpr.eqns:
            inputs = [_look_up(names, variable) for variable in equation.invars]
            called = _called(equation)
            if called is not None:
                outputs = self.add(called, inputs)
            else:
                outputs = self._results(equation, [value for value in inputs if value is not None])
            names |= dict(zip(equation.outvars, outputs, strict=True))
        return [_look_up(names, variable) for variable in jaxpr.outvars]

    def made(self, wanted: set[int]) -> set[int]:
        """Those of the values that are not there anyway."""
        return {number for number in wanted if self._values[number].made_by is not None}

    def fewest(self, kept: set[int]) -> set[int]:
        """Values to keep so that all that are wanted can be had by cheap equations.

        From the last to the first, a value is given up for those that it comes from, if these take
        no more.
        """
        queue = [-number for number in kept]
        heapq.heapify(queue)
        while queue:
            number = -heapq.heappop(queue)
            value = self._values[number]
            if number in self._is_read_stored or value.made_by.startswith(_STORED):  # type: ignore[union-attr]
                continue
            others = self.made(set(value.inputs)) - kept
            if sum(self._values[other].size for other in others) <= value.size:
                kept = (kept - {number}) | others
                for other in others:
                    heapq.heappush(queue, -other)
        return kept

    def sum(self, kept: Iterable[int]) -> KeptBytes:
        """Bytes of these values."""
        values = [self._values[number] for number in kept]
        stacked = sum(value.size for value in values if value.is_stacked)
        return KeptBytes(
            sum(value.size for value in values if not value.is_stacked),
            stacked // LOOP_LENGTH,
            self._one_iteration,
        )

    def _results(self, equation: Any, inputs: list[int]) -> list[int | None]:
        name = equation.primitive.name
        if name.startswith(_READ_STORED):
            self._is_read_stored.update(inputs)
        is_loop = name == "scan" and equation.params["length"] == LOOP_LENGTH
        carried = len(equation.outvars)
        if is_loop:
            body = _open(equation.params["jaxpr"])
            carried = _num_carried(equation.outvars, body)
            self._one_iteration = _fewest_bytes(body, carried)
        return [
            self._new(_size(variable), name, tuple(inputs), index >= carried)
            for index, variable in enumerate(equation.outvars)
        ]

    def _new(self, size: int, made_by: str | None, inputs: tuple[int, ...], stacked: bool) -> int:
        self._values.append(_Value(size, made_by, inputs, stacked))
        return len(self._values) - 1


def _fewest_bytes(body: core.Jaxpr, carried: int) -> int:
    """Of what an iteration hands to its backward pass."""
    values = _Values()
    wanted = values.add(body, [values.given() for _ in body.invars])[carried:]
    kept = values.fewest(values.made({value for value in wanted if value is not None}))
    return values.sum(kept).once


def _num_carried(results: list[Any], body: core.Jaxpr) -> int:
    """How many of a loop's results, which come first, are not stacked over its iterations."""
    # By shapes, since the equation's parameters that tell it differ between versions of JAX.
    made: list[Any] = body.outvars
    pairs = zip(results, made, strict=True)
    return sum(result.aval.shape == each.aval.shape for result, each in pairs)


def _open(jaxpr: core.Jaxpr | core.ClosedJaxpr) -> core.Jaxpr:
    return jaxpr.jaxpr if isinstance(jaxpr, core.ClosedJaxpr) else jaxpr


def _look_up(names: dict[Any, int | None], variable: Any) -> int | None:
    return None if isinstance(variable, core.Literal) else names[variable]


def _called(equation: Any) -> core.Jaxpr | None:
    """The function that an equation does nothing but call."""
    name = equation.primitive.name
    if not name.startswith(_CALLS):
        return None
    for key in ("jaxpr", "call_jaxpr", "fun_jaxpr"):
        inner = equation.params.get(key)
        if inner is not None:
            return _open(inner)
    return None


def _size(variable: Any) -> int:
    aval = variable.aval
    return math.prod(aval.shape) * aval.dtype.itemsize
