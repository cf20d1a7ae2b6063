"""Puts layers, which JAX returns sorted by name, back into the model's order."""

import re
from collections.abc import Mapping
from typing import TypeVar

Value = TypeVar("Value")

# First parts of names, in the order in which a forward pass meets them; others come last.
_PARTS = (
    "embedding",
    "prelude",
    "injection_norm",
    "core_in",
    "core",
    "core_out",
    "exit_gate",
    "coda",
    "final_norm",
)


def in_model_order(values: Mapping[str, Value]) -> dict[str, Value]:
    """The same mapping, its names as 'core/layer_0/iteration_4' in the model's order.

    Of the core's, iterations come one after the other, each with its layers.
    """
    return dict(sorted(values.items(), key=lambda item: _rank(item[0])))


def _rank(name: str) -> tuple[int, int, int, str]:
    part = name.partition("/")[0]
    place = _PARTS.index(part) if part in _PARTS else len(_PARTS)
    return place, _number("iteration", name), _number("layer", name), name


def _number(word: str, name: str) -> int:
    found = re.search(rf"{word}_(\d+)", name)
    return int(found[1]) if found else -1
