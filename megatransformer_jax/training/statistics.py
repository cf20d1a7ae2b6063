"""Running statistics among the parameters: no optimiser moves them, the step updates them.

Their gradients are reports of what was seen (nn/peer.py).
"""

from typing import Any

import jax
import jax.numpy as jnp

from megatransformer_jax.nn.peer import COUNT, MEAN, VARIANCE, is_statistic


def without_statistics(gradients: Any) -> Any:
    """The gradients with zeros for statistics: for the norm, clipping and the optimiser."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: jnp.zeros_like(leaf) if is_statistic(path) else leaf, gradients
    )


def update_statistics(updated: Any, before: Any, gradients: Any, momentum: float) -> Any:
    """`updated` with statistics moved from where they were towards what the step has seen.

    running <- momentum * running + (1 - momentum) * mean over uses of the batch's statistic; where
    nothing was seen they stay.

    Args:
      updated: the parameters after the optimiser.
      before: the same before the step.
      gradients: as differentiated, with the reports.
      momentum: in [0, 1).
    """
    uses = {
        path[:-1]: leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(gradients)
        if is_statistic(path) and path[-1].key == COUNT
    }

    def update(path: tuple[Any, ...], after: jax.Array, old: jax.Array, report: jax.Array) -> Any:
        if not is_statistic(path):
            return after
        if path[-1].key not in (MEAN, VARIANCE) or path[:-1] not in uses:
            return old
        return old - (1.0 - momentum) * report / jnp.maximum(uses[path[:-1]], 1.0)

    return jax.tree_util.tree_map_with_path(update, updated, before, gradients)


def keep_statistics(average: Any, latest: Any) -> Any:
    """An average of parameters with the latest statistics, which are averages themselves."""
    return jax.tree_util.tree_map_with_path(
        lambda path, mean, last: last if is_statistic(path) else mean, average, latest
    )
