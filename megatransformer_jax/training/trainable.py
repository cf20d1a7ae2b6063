"""Which parameters a run trains, the tree without the others, and those that no optimiser moves.

Frozen parameters get no gradient: the step differentiates with respect to the trained ones alone.
So the optimiser has no moments for them, decay does not reach them, and the gradient norm and its
clipping do not count them.
"""

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from megatransformer_jax.config.fine_tuning import EXIT_GATE, FineTuningConfig
from megatransformer_jax.config.option import ConfigError
from megatransformer_jax.models.adaptation import BASE, LORA
from megatransformer_jax.models.media.build import IMAGE_VAE
from megatransformer_jax.nn.peer import COUNT, MEAN, VARIANCE, is_statistic

# ------------------------------------------------------------------------------
# Trained and frozen.


def trained_mask(kept: Any, config: FineTuningConfig) -> Any:
    """A tree of bools like `kept` (`kept_params`, arrays or shapes): True where trained.

    With LoRA that is its updates and, itself, the exit gate. A trained autoencoder of images within
    the model never is.

    Raises:
      ConfigError: if a pattern matches no parameter, or all are frozen.
    """
    if config.lora.rank:
        return {
            BASE: map_named(lambda path, _: path.startswith(EXIT_GATE), kept[BASE]),
            LORA: jax.tree.map(lambda _: True, kept[LORA]),
        }
    option = "train_only" if config.train_only else "freeze"
    patterns = config.train_only or config.freeze
    matched = set()

    def is_trained(path: tuple[Any, ...], leaf: Any) -> bool:
        del leaf
        name = path_text(path)
        if IMAGE_VAE in name.split("/"):
            return False
        hits = [pattern for pattern in patterns if re.search(pattern, name)]
        matched.update(hits)
        return bool(hits) == bool(config.train_only)

    mask = jax.tree_util.tree_map_with_path(is_trained, kept)
    for pattern in patterns:
        if pattern not in matched:
            names = [path_text(path) for path, _ in jax.tree_util.tree_leaves_with_path(kept)]
            raise ConfigError(
                f"fine_tuning.{option}",
                f"{pattern!r} matches no parameter; their paths are {', '.join(names[:8])}"
                f"{', ...' if len(names) > 8 else ''}.",
            )
    if not any(jax.tree.leaves(mask)):
        raise ConfigError(
            "fine_tuning.freeze", f"{patterns!r} freezes every parameter; leave some to train."
        )
    return mask


def split_params(kept: Any, config: FineTuningConfig) -> tuple[Any, Any]:
    """The trained parameters and the frozen ones: two trees like `kept`, None where not.

    None is an empty subtree, so gradients and optimisers see the trained leaves alone.
    """
    mask = trained_mask(kept, config)
    trained = jax.tree.map(lambda leaf, is_trained: leaf if is_trained else None, kept, mask)
    frozen = jax.tree.map(lambda leaf, is_trained: None if is_trained else leaf, kept, mask)
    return trained, frozen


def join_params(trained: Any, frozen: Any) -> Any:
    """The inverse of `split_params`."""
    return jax.tree.map(
        lambda leaf, other: other if leaf is None else leaf,
        trained,
        frozen,
        is_leaf=lambda node: node is None,
    )


# ------------------------------------------------------------------------------
# Parameters by path, such as core/layers/layer_0/mlp/up.


def path_text(path: tuple[Any, ...]) -> str:
    """A path of `jax.tree_util` as regular expressions see it: names with slashes between."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def map_named(function: Callable[[str, Any], Any], tree: Any) -> Any:
    """A tree of the same structure with `function(path, leaf)` in place of each leaf."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: function(path_text(path), leaf), tree
    )


# ------------------------------------------------------------------------------
# Running statistics among the parameters: no optimiser moves them, the step updates them.
#
# Their gradients are reports of what was seen (nn/peer.py).


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
