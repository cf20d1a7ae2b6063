"""Where the arrays of an optimiser's state are."""

from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from megatransformer_jax.training.parameter_paths import map_named, path_text


def optimizer_shardings(opt_state: Any, params: Any, shardings: Any) -> Any:
    """The sharding of every array of an optimiser's state.

    An array belongs to a parameter if its path ends in the parameter's, as those of moments and
    averages do, also inside `optax.masked` and `optax.partition`. With the parameter's shape it
    gets the parameter's sharding; with one axis more in front (a ring of gradients) the same
    behind that axis, which is not cut. Everything else, such as counters and the rows and columns
    of factored moments, is small and on every device.

    Args:
      opt_state: arrays or shapes.
      params: the parameters that the optimiser was made for, arrays or shapes.
      shardings: a tree like `params` of `NamedSharding`s, at least one.
    """
    leaves = jax.tree_util.tree_leaves_with_path(params)
    places = jax.tree.leaves(shardings)
    table = {
        path_text(path): (leaf.shape, place)
        for (path, leaf), place in zip(leaves, places, strict=True)
    }
    replicated = NamedSharding(places[0].mesh, PartitionSpec())

    def sharding(path: str, leaf: Any) -> NamedSharding:
        name = _longest_ending(path, table)
        if name is None:
            return replicated
        shape, place = table[name]
        if leaf.shape == shape:
            return place
        if leaf.shape[1:] == shape:
            return NamedSharding(place.mesh, PartitionSpec(None, *place.spec))
        return replicated

    return map_named(sharding, opt_state)


def _longest_ending(path: str, names: Any) -> str | None:
    """The longest end of a path, at a slash, that is among the names."""
    while path and path not in names:
        path = path.partition("/")[2]
    return path or None
