"""Which parameters a run trains, and the tree without the others.

Frozen parameters get no gradient: the step differentiates with respect to the trained ones alone.
So the optimiser has no moments for them, decay does not reach them, and the gradient norm and its
clipping do not count them.
"""

import re
from typing import Any

import jax

from megatransformer_jax.config.fine_tuning import EXIT_GATE, FineTuningConfig
from megatransformer_jax.config.option import ConfigError
from megatransformer_jax.models.adaptation import BASE, LORA
from megatransformer_jax.models.media.build import IMAGE_VAE
from megatransformer_jax.training.parameter_paths import map_named, path_text


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
