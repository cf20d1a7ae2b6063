"""Parameters by path, such as core/layers/layer_0/mlp/up."""

from collections.abc import Callable
from typing import Any

import jax


def path_text(path: tuple[Any, ...]) -> str:
    """A path of `jax.tree_util` as regular expressions see it: names with slashes between."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def map_named(function: Callable[[str, Any], Any], tree: Any) -> Any:
    """A tree of the same structure with `function(path, leaf)` in place of each leaf."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: function(path_text(path), leaf), tree
    )
