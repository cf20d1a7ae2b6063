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
# Elements in a row of a TPU's memory.
TPU_LANES = 128
# What kernels write, and what rematerialisation saves (it marks that so), keeps its order of axes,
# so that the last axis lies in such rows.
_IN_LANES = ("pallas_call", "reduce_precision")
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
# What goes into these is stored too: no loop and no kernel starts from values in the making.
_READ_STORED = ("conv_general_dilated", "pallas_call", "scan", "while")
# A product computes its factors while it reads them, unless that takes another order of axes or, in
# a loop, one of these for each element. One of these per row, as in norms, does not count: there
# are this many times fewer.
_ELEMENTS_PER_ROW = 64
_REORDERS = ("transpose",)
_NOT_INTO_PRODUCTS_OF_LOOPS = (
    *_REORDERS,
    "atan2",
    "cos",
    "div",
    "erf",
    "exp",
    "log",
    "pow",
    "sin",
    "sqrt",
    "tan",
)
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
      weights: the part of `once` that comes from the parameters alone, such as copies in another
        type.
      per_iteration: kept in each of the loop's iterations.
      one_iteration: the fewest bytes that a single iteration is differentiated from.
    """

    once: int
    weights: int
    per_iteration: int
    one_iteration: int


def kept_bytes(
    function: Callable[..., Any],
    params: Any,
    *arguments: Any,
    fuses: bool = True,
    lanes: int = 1,
) -> KeptBytes:
    """Traces a forward pass and estimates what is kept for the gradients by its first argument.

    Args:
      function: pure; a loop of `LOOP_LENGTH` iterations in it is counted apart.
      params: arrays or `jax.ShapeDtypeStruct`s, as are all others.
      *arguments: the function's other arguments.
      fuses: whether the compiler computes again what is cheap; CPU's does so little that it is left
        out there.
      lanes: elements in a row of memory, `TPU_LANES` on TPU; with 1 memory has no rows.
    """

    def residuals(params: Any, *arguments: Any) -> list[Any]:
        backward = jax.vjp(lambda params: function(params, *arguments), params)[1]
        return jax.tree.leaves(backward)  # The function is a pytree of what it keeps.

    traced = jax.make_jaxpr(residuals)(params, *arguments).jaxpr
    values = _Values(lanes)
    num_weights = len(jax.tree.leaves(params))
    given: list[int | None] = [values.given(n < num_weights) for n in range(len(traced.invars))]
    wanted = values.add(traced, given)
    kept = values.made({value for value in wanted if value is not None})
    return values.sum(values.fewest(kept) if fuses else kept)


@dataclasses.dataclass(frozen=True)
class _Value:
    """One array of a trace: how large it is and what it comes from. `made_by` is None of what the
    function was given; `is_weight` says that it comes from parameters alone."""

    size: int
    made_by: str | None
    inputs: tuple[int, ...]
    is_stacked: bool
    is_weight: bool


class _Values:
    """The values of a trace in the order in which they are made, calls of functions laid out."""

    def __init__(self, lanes: int, in_loop: bool = False) -> None:
        self._lanes = lanes
        self._not_into_products = _NOT_INTO_PRODUCTS_OF_LOOPS if in_loop else _REORDERS
        self._values: list[_Value] = []
        self._is_read_stored: set[int] = set()
        self._is_factor: set[int] = set()
        self._one_iteration = 0

    def given(self, is_weight: bool = False) -> int:
        """A value that is there anyway."""
        self._values.append(_Value(0, None, (), is_stacked=False, is_weight=is_weight))
        return len(self._values) - 1

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
                outputs = self._results(equation, inputs)
            names |= dict(zip(equation.outvars, outputs, strict=True))
        return [_look_up(names, variable) for variable in jaxpr.outvars]

    def made(self, wanted: Iterable[int]) -> set[int]:
        """Those of the values that are not there anyway."""
        return {number for number in wanted if self._values[number].made_by is not None}

    def size(self, number: int) -> int:
        """Bytes of one value; 0 if it is there anyway."""
        return self._values[number].size

    def fewest(self, kept: set[int]) -> set[int]:
        """Values to keep so that all that are wanted can be had by cheap equations.

        From the last to the first, a value is given up for those that it comes from, if these take
        no more. Factors of products come after all others, which settle what there is to compute
        them from.
        """
        for with_factors in (False, True):
            queue = [-number for number in kept]
            heapq.heapify(queue)
            while queue:
                number = -heapq.heappop(queue)
                is_factor = number in self._is_factor
                if number not in kept or not self._may_go(number) or is_factor > with_factors:
                    continue
                product_of = self._values[number].size if is_factor else 0
                sources = self._sources(number, kept - {number}, product_of, {})
                if sources is not None and number not in sources:
                    kept = (kept - {number}) | sources
                    for source in sources:
                        heapq.heappush(queue, -source)
        return kept

    def _may_go(self, number: int) -> bool:
        """Copies of weights stay, as the forward pass makes them all the same."""
        if number in self._is_read_stored or self._is_stored(number):
            return False
        return not (number in self._is_factor and self._values[number].is_weight)

    def sum(self, kept: Iterable[int]) -> KeptBytes:
        """Bytes of these values."""
        values = [self._values[number] for number in kept]
        stacked = sum(value.size for value in values if value.is_stacked)
        return KeptBytes(
            sum(value.size for value in values if not value.is_stacked),
            sum(value.size for value in values if value.is_weight),
            stacked // LOOP_LENGTH,
            self._one_iteration,
        )

    def _is_stored(self, number: int) -> bool:
        made_by = self._values[number].made_by
        return made_by is not None and made_by.startswith(_STORED)

    def _sources(
        self, number: int, kept: set[int], product_of: int, known: dict[int, set[int] | None]
    ) -> set[int] | None:
        """The fewest bytes to keep beyond `kept` from which a value can be computed again: the
        values it comes from, near or far, or itself.

        `product_of`: if not 0, by a product that reads so many bytes and computes none of
        what is not computed into products; None if that cannot be.
        """
        value = self._values[number]
        if number in kept or value.made_by is None:
            return set()
        is_expensive = value.made_by.startswith(self._not_into_products)
        if is_expensive and value.size * _ELEMENTS_PER_ROW > product_of > 0:
            return None
        if number not in known:
            sources: set[int] | None = {number}
            if not self._is_stored(number):
                sources = self._sources_of_inputs(value, kept, product_of, known)
                if sources is not None and self._bytes(sources) > value.size:
                    sources = {number}
            known[number] = sources
        return known[number]

    def _sources_of_inputs(
        self, value: _Value, kept: set[int], product_of: int, known: dict[int, set[int] | None]
    ) -> set[int] | None:
        sources: set[int] = set()
        # The stored ones are known at once, and often decide it.
        for other in sorted(value.inputs, key=self._is_stored, reverse=True):
            found = self._sources(other, kept, product_of, known)
            if found is None:
                return None
            sources |= found
        return sources

    def _bytes(self, numbers: Iterable[int]) -> int:
        return sum(self._values[number].size for number in numbers)

    def _results(self, equation: Any, given: list[int | None]) -> list[int | None]:
        name = equation.primitive.name
        inputs = [value for value in given if value is not None]
        if name.startswith(_READ_STORED):
            self._is_read_stored.update(inputs)
        if name.startswith("dot"):
            self._is_factor.update(inputs)
        carried = len(equation.outvars)
        lanes = self._lanes if name in _IN_LANES else 1
        sizes = [_size(variable, lanes) for variable in equation.outvars]
        if name == "pallas_call":
            for number, variable in zip(given, equation.invars, strict=True):
                if number is not None and self._values[number].made_by is not None:
                    value = self._values[number]
                    self._values[number] = dataclasses.replace(value, size=_size(variable, lanes))
        if name == "scan" and equation.params["length"] == LOOP_LENGTH:
            body = _open(equation.params["jaxpr"])
            carried = _num_carried(equation.outvars, body)
            self._one_iteration, stacked = _of_loop(body, carried, self._lanes)
            sizes[carried:] = [
                max(size, LOOP_LENGTH * one)
                for size, one in zip(sizes[carried:], stacked, strict=True)
            ]
        return [
            self._new(size, name, tuple(inputs), index >= carried)
            for index, size in enumerate(sizes)
        ]

    def _new(self, size: int, made_by: str, inputs: tuple[int, ...], stacked: bool) -> int:
        is_weight = bool(inputs) and all(self._values[number].is_weight for number in inputs)
        self._values.append(_Value(size, made_by, inputs, stacked, is_weight))
        return len(self._values) - 1


def _of_loop(body: core.Jaxpr, carried: int, lanes: int) -> tuple[int, list[int]]:
    """Of what an iteration hands to its backward pass: the fewest bytes, and those of each value,
    0 for those that it was given."""
    values = _Values(lanes, in_loop=True)
    wanted = values.add(body, [values.given() for _ in body.invars])[carried:]
    kept = values.fewest(values.made({value for value in wanted if value is not None}))
    return values.sum(kept).once, [0 if one is None else values.size(one) for one in wanted]


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


def _size(variable: Any, lanes: int) -> int:
    """Bytes, with the last axis in whole rows of so many elements."""
    *others, last = variable.aval.shape or (1,)
    return math.prod(others) * -(-last // lanes) * lanes * variable.aval.dtype.itemsize
