"""Stacks of layers: which of them share weights, and running them in loops.

Orders of shared layers are those of arXiv 2104.06022, algorithm 1.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from megatransformer_jax.config.model import ModelConfig


def layer_owners(scheme: str, num_layers: int, num_unique: int) -> tuple[int, ...]:
    """The weights of each layer, as numbers below `num_unique`.

    Where `num_unique` does not divide `num_layers`, `sequence` makes runs whose lengths differ by
    at most one, and the last round of `cycle` and `cycle_rev` is cut short.

    Args:
      scheme: as `SharingConfig.scheme`.
      num_layers: layers of the stack.
      num_unique: different ones, at most `num_layers`.

    Raises:
      ValueError: for an unknown scheme, 'none' with fewer unique layers than layers, or more.

    Examples:
      >>> layer_owners("cycle_rev", 6, 3)
      (0, 1, 2, 2, 1, 0)
    """
    if num_unique > num_layers:
        raise ValueError(f"{num_unique} unique layers of {num_layers}; there must be fewer")
    layers = range(num_layers)
    match scheme:
        case "none" | "sequence" | "cycle" | "cycle_rev" if num_unique == num_layers:
            return tuple(layers)
        case "sequence":
            return tuple(layer * num_unique // num_layers for layer in layers)
        case "cycle":
            return tuple(layer % num_unique for layer in layers)
        case "cycle_rev":
            last_round = (num_layers - 1) // num_unique
            return tuple(
                layer % num_unique
                if layer // num_unique < last_round
                else num_unique - 1 - layer % num_unique
                for layer in layers
            )
    raise ValueError(
        f"scheme {scheme!r} does not share {num_unique} unique layers among {num_layers}; "
        "known: sequence, cycle, cycle_rev"
    )


def stack_owners(config: ModelConfig, stack: str) -> tuple[int, ...]:
    """`layer_owners` of the stack 'prelude', 'core' or 'coda'; layer i has the parameters
    `layer_{owners[i]}`."""
    num_layers: int = getattr(config, f"{stack}_layers")
    return layer_owners(config.sharing.scheme, num_layers, config.unique_layers(stack))


def earlier_uses(owners: tuple[int, ...]) -> tuple[int, ...]:
    """How often each layer's weights were used by layers before it: where its call stands among
    those that its module has recorded."""
    return tuple(owners[:layer].count(owner) for layer, owner in enumerate(owners))


# ------------------------------------------------------------------------------
# Runs the layers of a stack in loops over stacked weights, so that a deep one compiles fast.
#
# Parameters stay a tree per layer; they are stacked where they are used. Layers that share weights
# (nn/layer_sharing.py) become repeats of the loop and not copies of the weights.

# (parameters of a layer, input, the layer's place in its stack, traced, and the place, static, of
# a layer of the same kind) -> output
ApplyLayer = Callable[[Any, jax.Array, jax.Array, int], jax.Array]


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

    Examples:
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


class LayerGroup(NamedTuple):
    """Layers of different kinds in a loop: `period` of them per turn, the same kinds in each.

    Attributes:
      start: place of the first layer in the stack.
      period: layers per turn.
      turns: how often the loop turns.
    """

    start: int
    period: int
    turns: int


def plan_groups(kinds: Sequence[Hashable]) -> list[LayerGroup]:
    """Loops over layers whose kinds come in repeating patterns or in runs.

    Each takes the most layers that repeat, in the shortest period that does.

    Examples:
      >>> plan_groups("abab")
      [LayerGroup(start=0, period=2, turns=2)]
      >>> plan_groups("aaab")
      [LayerGroup(start=0, period=1, turns=3), LayerGroup(start=3, period=1, turns=1)]
    """
    groups, start = [], 0
    while start < len(kinds):
        best = LayerGroup(start, 1, 1)
        for period in range(1, (len(kinds) - start) // 2 + 1):
            turns = _turns(kinds[start:], period)
            if turns > 1 and period * turns > best.period * best.turns:
                best = LayerGroup(start, period, turns)
        groups.append(best)
        start += best.period * best.turns
    return groups


def _turns(kinds: Sequence[Hashable], period: int) -> int:
    """How often the first `period` kinds come in a row."""
    turns = 1
    while kinds[turns * period :][:period] == kinds[:period]:
        turns += 1
    return turns


def scan_layers(
    apply_layer: ApplyLayer,
    params: Mapping[str, Any],
    owners: tuple[int, ...],
    x: Float[Array, "B T D"],
    kinds: tuple[Hashable, ...] = (),
) -> Float[Array, "B T D"]:
    """Applies the layers of a stack, each loop of `plan_loops` or `plan_groups` compiled once.

    Args:
      apply_layer: one layer; pure.
      params: `layer_0`, `layer_1`, ... with the same tree and shapes, as far as kinds are equal.
      owners: the weights of each layer.
      x: the stack's input.
      kinds: what tells layers apart whose computation differs. Empty: they are all alike.

    Raises:
      ValueError: if layers of several kinds share weights.
    """
    if len(set(kinds)) > 1:
        if len(set(owners)) < len(owners):
            raise ValueError("layers of different kinds share weights; they cannot be in a loop")
        for group in plan_groups(kinds):
            x = _run_group(apply_layer, params, group, x)
        return x
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
            return apply_layer(of_layer, x, places[0], 0), None
        return jax.lax.scan(lambda x, place: (apply_layer(of_layer, x, place, 0), None), x, places)

    def one_round(x: jax.Array, places: jax.Array) -> tuple[jax.Array, None]:
        return jax.lax.scan(repeat, x, (weights, places), reverse=is_reversed)

    if len(places) == 1:
        return one_round(x, places[0])[0]
    return jax.lax.scan(one_round, x, places)[0]


def _run_group(
    apply_layer: ApplyLayer, params: Mapping[str, Any], group: LayerGroup, x: jax.Array
) -> jax.Array:
    members = range(group.period)
    places = group.start + np.arange(group.turns * group.period).reshape(group.turns, -1)
    weights = [
        jax.tree.map(lambda *leaves: jnp.stack(leaves), *(params[f"layer_{i}"] for i in column))
        for column in places.T
    ]

    def turn(x: jax.Array, inputs: tuple[list[Any], jax.Array]) -> tuple[jax.Array, None]:
        each, at = inputs
        for member in members:
            x = apply_layer(each[member], x, at[member], group.start + member)
        return x, None

    if group.turns == 1:
        of_layer = [params[f"layer_{group.start + member}"] for member in members]
        return turn(x, (of_layer, jnp.asarray(places[0])))[0]
    return jax.lax.scan(turn, x, (weights, jnp.asarray(places)))[0]


def _run_at(owners: tuple[int, ...], start: int) -> tuple[int, ...]:
    """The longest run from `start` whose owners are equal, count up or count down."""
    end = start + 1
    while end < len(owners):
        first, step = owners[start + 1] - owners[start], owners[end] - owners[end - 1]
        if step not in (-1, 0, 1) or step != first:
            break
        end += 1
    return owners[start:end]
