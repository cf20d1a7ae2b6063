"""Parameters by module, from shapes alone: nothing is allocated."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import jax

from megatransformer_jax.config.recurrence import is_loop_parameter

# Part of the model -> kind of layer -> number of parameters.
ParameterCounts = dict[str, dict[str, int]]

KINDS = ("attention", "feed_forward", "norms", "other")
# What every iteration of the core runs through, as parts of `ParameterCounts`.
ITERATED_PARTS = ("adapter", "core")
# In the order of a forward pass. A tied head has no parameters and no entry.
PARTS = (
    "embedding",
    "value_embedding",
    "prelude",
    "image_prelude",
    "audio_prelude",
    "injection_norm",
    "core_in",
    *ITERATED_PARTS,
    "loop_parameters",
    "core_out",
    "c_matrix",
    "exit_gate",
    "coda",
    "final_norm",
    "head",
    "image_coda",
    "image_decoder",
    "image_vae",
    "audio_coda",
    "audio_decoder",
    "log_variances",
)


def count_parameters(params: Any) -> ParameterCounts:
    """Counts parameters by part of the model and kind of layer; both only where there are any.

    Args:
      params: the tree of `init_params`, of arrays or of shapes.
    """
    counts: ParameterCounts = {part: {} for part in PARTS}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        names = [entry.key for entry in path]
        kinds = counts[_part(names)]
        kinds[_kind(names)] = kinds.get(_kind(names), 0) + leaf.size
    return {part: kinds for part, kinds in counts.items() if kinds}


def total_parameters(counts: Mapping[str, Mapping[str, int]]) -> int:
    """The number of different parameters; a tied embedding counts once."""
    return sum(size for kinds in counts.values() for size in kinds.values())


def effective_parameters(counts: Mapping[str, Mapping[str, int]], depth: int) -> int:
    """Parameters of the unrolled model: as if each of `depth` iterations had its own core.

    Layers of a stack that share weights still count once (once per iteration in the core).
    """
    iterated = total_parameters({part: counts.get(part, {}) for part in ITERATED_PARTS})
    return total_parameters(counts) + (depth - 1) * iterated


@dataclasses.dataclass(frozen=True)
class LayerSizes:
    """Parameters of one layer, and their bytes in float32."""

    parameters: int
    num_bytes: int


def count_layers(params: Any) -> dict[str, LayerSizes]:
    """Sizes by layer, as paths such as 'core/layers/layer_0', in the order of the model's parts;
    what stands outside of layers is named after its module.

    Args:
      params: the tree of `init_params`, of arrays or of shapes.
    """
    sizes: dict[str, LayerSizes] = {}
    leaves = [
        ([entry.key for entry in path], leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    ]
    for names, leaf in sorted(leaves, key=lambda item: _order(item[0])):
        name = _layer(names)
        before = sizes.get(name, LayerSizes(0, 0))
        sizes[name] = LayerSizes(
            before.parameters + leaf.size, before.num_bytes + leaf.size * leaf.dtype.itemsize
        )
    return sizes


def _order(names: list[str]) -> tuple[int, list[str]]:
    """By part, then by name, numbers by their value."""
    padded = [re.sub(r"\d+", lambda number: number[0].zfill(6), name) for name in names]
    return PARTS.index(_part(names)), padded


def _layer(names: list[str]) -> str:
    """Up to the last numbered module, or the first two."""
    numbered = [index for index, name in enumerate(names[:-1]) if name[-1].isdigit()]
    end = numbered[0] + 1 if numbered else min(len(names) - 1, 2)
    return "/".join(names[: max(1, end)])


def _part(names: list[str]) -> str:
    if is_loop_parameter("/".join(names)):
        return "loop_parameters"
    if names[0] == "core":
        return "adapter" if names[1] == "adapter" else "core"
    if names[0] == "media":
        return "image_vae" if "image_vae" in names else names[1]
    if names[0] == "embedding":
        return "head" if names[1] in ("head", "head_bias") else "embedding"
    return names[0]


def _kind(names: list[str]) -> str:
    if any("norm" in name for name in names):
        return "norms"
    if "attention" in names or "cross_attention" in names:
        return "attention"
    return "feed_forward" if "mlp" in names else "other"
