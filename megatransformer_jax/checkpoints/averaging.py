"""The mean of several models' parameters, one model in memory at a time."""

from collections.abc import Iterable
from typing import Any

import jax
import numpy as np

from megatransformer_jax.checkpoints.compatibility import CheckpointMismatch, shape_differences
from megatransformer_jax.checkpoints.manager import tree_shapes


def average_trees(trees: Iterable[Any]) -> Any:
    """The mean of every leaf, on the host.

    Sums are float64 and rounded once, so that the mean of any number of float32 trees is exact to
    the last bit of float32; a running mean in float32 would lose bits with every tree. That takes 8
    bytes per parameter in addition to the tree that is being added.

    Running statistics are averaged as the weights are: close to those of the averaged model, which
    only a pass over data would give exactly (arXiv 1803.05407).

    Leaves that are not floats (counters, int8 weights) have no mean: they must be equal in all.

    Args:
      trees: of arrays, at least one, with the same leaves of the same shapes. Asked for one by one.

    Returns:
      The tree as NumPy arrays, each of its leaf's type.

    Raises:
      CheckpointMismatch: if names or shapes of leaves differ, or leaves that are not floats do.
      ValueError: if there is no tree.
    """
    first: Any = None
    sums: list[np.ndarray] = []
    count = 0
    for tree in trees:
        leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]
        if first is None:
            first = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)
            sums = [_summand(leaf) for leaf in leaves]
        else:
            _check_alike(first, tree, count)
            names = tree_shapes(tree)
            for name, total, leaf in zip(names, sums, leaves, strict=True):
                _add(name, total, leaf)
        count += 1
        del tree, leaves  # It must not be in memory together with the next one.
    if first is None:
        raise ValueError("there is no tree to average")
    shapes, structure = jax.tree.flatten(first)
    means = [
        (total / count).astype(shape.dtype) if _is_float(shape) else total
        for total, shape in zip(sums, shapes, strict=True)
    ]
    return jax.tree.unflatten(structure, means)


def _is_float(leaf: Any) -> bool:
    # NumPy's own hierarchy does not have bfloat16.
    return bool(jax.numpy.issubdtype(leaf.dtype, jax.numpy.floating))


def _summand(leaf: np.ndarray) -> np.ndarray:
    return np.array(leaf, np.float64 if _is_float(leaf) else leaf.dtype)


def _add(name: str, total: np.ndarray, leaf: np.ndarray) -> None:
    if total.dtype == np.float64 and _is_float(leaf):
        total += leaf.astype(np.float64)
    elif total.dtype != leaf.dtype or not np.array_equal(total, leaf):
        raise CheckpointMismatch(
            f"{name} has type {leaf.dtype} and other values than in the first checkpoint, so it "
            "has no mean; average checkpoints of one run, between which it does not change."
        )


def _check_alike(first: Any, tree: Any, index: int) -> None:
    differences = shape_differences(tree_shapes(first), tree_shapes(tree))
    if differences:
        raise CheckpointMismatch(
            f"checkpoint {index + 1} of those to average has other arrays than the first:\n  "
            + "\n  ".join(differences[:12])
            + "\nAverage checkpoints of one architecture."
        )
