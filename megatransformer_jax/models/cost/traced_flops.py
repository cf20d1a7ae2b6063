"""Floating-point operations of a function, read off its trace on abstract arrays.

For networks whose formulas would repeat their code: nothing is computed or allocated. As in
`flops`, matrix products only, and convolutions, which are sums of them.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.extend import core


def product_flops(function: Callable[..., Any], *arguments: Any) -> float:
    """Counts the products of one call: 2 for every multiplication that is added up.

    A loop counts as often as it runs, of alternatives the most expensive one. A convolution counts
    its whole kernel at every output, also where it meets the zeros around its input.

    Args:
      function: of arrays, to arrays.
      arguments: arrays, or `jax.ShapeDtypeStruct`s in their place.

    Raises:
      ValueError: if the number of a loop's iterations is not known from the trace.
    """
    return _of_jaxpr(jax.make_jaxpr(function)(*arguments).jaxpr)


def _of_jaxpr(jaxpr: core.Jaxpr) -> float:
    return sum((_of_equation(equation) for equation in jaxpr.eqns), 0.0)


def _of_equation(equation: Any) -> float:
    inner = [_of_jaxpr(jaxpr) for jaxpr in _jaxprs(equation.params)]
    match equation.primitive.name:
        case "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            shape = equation.invars[0].aval.shape
            return 2.0 * _size(equation) * math.prod(shape[axis] for axis in contracted)
        case "conv_general_dilated":
            numbers = equation.params["dimension_numbers"]
            kernel = equation.invars[1].aval.shape
            # The second entry is the inputs of one group.
            taps = math.prod(kernel[axis] for axis in numbers.rhs_spec[1:])
            return 2.0 * _size(equation) * taps
        case "scan":
            return equation.params["length"] * sum(inner)
        case "cond":
            return max(inner)
        case "while":
            if sum(inner):
                raise ValueError(
                    "a loop whose number of iterations is data has no count; count one iteration"
                )
            return 0.0
        case "pallas_call":
            raise ValueError("a kernel written in Pallas has no count; trace the XLA one")
    return sum(inner, 0.0)


def _size(equation: Any) -> int:
    return math.prod(equation.outvars[0].aval.shape)


def _jaxprs(params: dict[str, Any]) -> list[core.Jaxpr]:
    """The functions that an equation calls."""
    found = []
    for value in params.values():
        for item in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(item, core.ClosedJaxpr):
                found.append(item.jaxpr)
            elif isinstance(item, core.Jaxpr):
                found.append(item)
    return found
