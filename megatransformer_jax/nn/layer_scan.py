"""Runs the layers of a stack in loops over stacked weights, so that a deep one compiles fast.

Parameters stay a tree per layer; they are stacked where they are used. Layers that share weights
(nn/layer_sharing.py) become repeats of the loop and not copies of the weights.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

# (parameters of a layer, input, the layer's place in its stack, traced) -> output
ApplyLayer = Callable[[Any, jax.Array, jax.Array], jax.Array]


class LayerLoop(NamedTuple):
    """Layers in three nested loops.

    Attributes:
      owners: weights of the middle loop, ascending.
      places: the layers' places in the stack, [rounds, owners, repeats]: the whole middle loop
        runs `rounds` times, and each of its weights is used `repeats` times in a row.
      is_reversed: the middle loop runs from the last to the first.
    """

    owners: tuple[int, ...]
    places: np.ndarray
    is_reversed: bool


def plan_loops(owners: tuple[int, ...]) -> list[LayerLoop]:
    """The fewest such loops for the orders of `layer_owners`: one, or two for `cycle_rev`.

    A last round that is cut short is a loop of its own; so is each run of a `sequence` whose runs
    are of unequal length.

    Example:
      >>> [(loop.owners, loop.is_reversed) for loop in plan_loops((0, 1, 2, 2, 1, 0))]
      [((0, 1, 2), False), ((0, 1, 2), True)]
    """
    if not owners:
        return []
    num_layers, num_unique = len(owners), len(set(owners))
    repeats = num_layers // num_unique
    if owners == tuple(layer // repeats for layer in range(num_layers)):
        each = tuple(range(num_unique))
        return [LayerLoop(each, np.arange(num_layers).reshape(1, num_unique, repeats), False)]
    loops, start = [], 0
    while start < num_layers:
        run = _run_at(owners, start)
        rounds = 1
        while owners[start + rounds * len(run) :][: len(run)] == run:
            rounds += 1
        places = np.arange(start, start + rounds * len(run))
        is_constant, is_reversed = run[0] == run[-1], run[0] > run[-1]
        if is_constant:
            loops.append(LayerLoop(run[:1], places.reshape(1, 1, -1), False))
        else:
            of_rounds = places.reshape(rounds, len(run), 1)
            of_rounds = of_rounds[:, ::-1] if is_reversed else of_rounds
            loops.append(LayerLoop(tuple(sorted(run)), of_rounds, is_reversed))
        start += rounds * len(run)
    return loops


def scan_layers(
    apply_layer: ApplyLayer,
    params: Mapping[str, Any],
    owners: tuple[int, ...],
    x: Float[Array, "B T D"],
) -> Float[Array, "B T D"]:
    """Applies the layers of a stack, each loop of `plan_loops` compiled once.

    Args:
      apply_layer: one layer; pure.
      params: `layer_0`, `layer_1`, ... with the same tree and shapes.
      owners: the weights of each layer.
      x: the stack's input.
    """
    for loop in plan_loops(owners):
        each = [params[f"layer_{owner}"] for owner in loop.owners]
        weights = jax.tree.map(lambda *leaves: jnp.stack(leaves), *each)
        x = _run_loop(apply_layer, weights, jnp.asarray(loop.places), loop.is_reversed, x)
    return x


def _run_loop(
    apply_layer: ApplyLayer, weights: Any, places: jax.Array, is_reversed: bool, x: jax.Array
) -> jax.Array:
    def repeat(x: jax.Array, inputs: tuple[Any, jax.Array]) -> tuple[jax.Array, None]:
        of_layer, places = inputs
        if len(places) == 1:
            return apply_layer(of_layer, x, places[0]), None
        return jax.lax.scan(lambda x, place: (apply_layer(of_layer, x, place), None), x, places)

    def one_round(x: jax.Array, places: jax.Array) -> tuple[jax.Array, None]:
        return jax.lax.scan(repeat, x, (weights, places), reverse=is_reversed)

    if len(places) == 1:
        return one_round(x, places[0])[0]
    return jax.lax.scan(one_round, x, places)[0]


def _run_at(owners: tuple[int, ...], start: int) -> tuple[int, ...]:
    """The longest run from `start` whose owners are equal, count up or count down."""
    end = start + 1
    while end < len(owners):
        first, step = owners[start + 1] - owners[start], owners[end] - owners[end - 1]
        if step not in (-1, 0, 1) or step != first:
            break
        end += 1
    return owners[start:end]
