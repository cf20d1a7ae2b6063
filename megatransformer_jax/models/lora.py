"""Low-rank updates beside frozen weights (LoRA, arXiv 2106.09685).

A target W of shape (*inputs, *outputs) gets a [*inputs, rank] and b [rank, *outputs], and the model
uses W + alpha / rank * a b. The product is added to W once per pass and not to each layer's output:
the core uses a weight in every iteration, so that two thin products per iteration and token would
cost more than one addition to W, and fused kernels and every other reader of weights need not know.
"""

import math
import re
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Key

from megatransformer_jax.config.fine_tuning import ATTENTION_AND_MLP, LoraConfig
from megatransformer_jax.config.option import ConfigError
from megatransformer_jax.models.weight_axes import num_input_axes

_TARGETS = "fine_tuning.lora.targets"


def init_lora(params: Any, axes: Any, config: LoraConfig, key: Key[Array, ""]) -> Any:
    """Updates that change nothing yet.

    a is normal with variance 1 / inputs, so that x a has the scale of x; b is zero.

    Args:
      params: the base, or its shapes: nested dicts of arrays.
      axes: logical names of every axis, from `param_axes`.
      config: rank and targets.
      key: randomness of a.

    Returns:
      Nested dicts as `params`, of the targets only, each with {'a', 'b'}, float32.

    Raises:
      ConfigError: if a pattern matches no parameter, or one that is no matrix, or if the rank is
        above the smaller side of a target.
    """
    shapes = {path: leaf.shape for path, leaf in flatten_dict(params, sep="/").items()}
    targets = _targets(axes, config)
    _check_rank({path: shapes[path] for path in targets}, targets, config.rank)
    lora = {}
    for index, (path, inputs) in enumerate(targets.items()):
        shape = shapes[path]
        std = 1 / math.sqrt(math.prod(shape[:inputs]))
        a_key = jax.random.fold_in(key, index)
        lora[f"{path}/a"] = std * jax.random.normal(a_key, (*shape[:inputs], config.rank))
        lora[f"{path}/b"] = jnp.zeros((config.rank, *shape[inputs:]))
    return unflatten_dict(lora, sep="/")


def lora_axes(axes: Any, config: LoraConfig) -> Any:
    """Logical axis names in the tree of `init_lora`: those of the base, none for the rank."""
    flat = flatten_dict(axes, sep="/")
    named = {}
    for path, inputs in _targets(axes, config).items():
        named[f"{path}/a"] = (*flat[path][:inputs], None)
        named[f"{path}/b"] = (None, *flat[path][inputs:])
    return unflatten_dict(named, sep="/")


def merge_lora(params: Any, lora: Any, config: LoraConfig) -> Any:
    """The base with the updates added; the tree of `params`, float32."""
    factor = config.alpha / config.rank
    weights, updates = flatten_dict(params, sep="/"), flatten_dict(lora, sep="/")
    for name in updates:
        path, _, part = name.rpartition("/")
        if part == "a":
            a, b = updates[f"{path}/a"], updates[f"{path}/b"]
            product = jnp.tensordot(a, b, axes=1, precision=jax.lax.Precision.HIGHEST)
            weights[path] = weights[path] + factor * product
    return unflatten_dict(weights, sep="/")


def _check_rank(shapes: dict[str, tuple[int, ...]], targets: dict[str, int], rank: int) -> None:
    """Checks that no update has more parameters than its rank can use: W has no higher one."""
    sides = {
        path: (math.prod(shape[: targets[path]]), math.prod(shape[targets[path] :]))
        for path, shape in shapes.items()
    }
    path = min(sides, key=lambda name: min(sides[name]))
    inputs, outputs = sides[path]
    if rank > min(inputs, outputs):
        raise ConfigError(
            "fine_tuning.lora.rank",
            f"{rank} is above the smaller side of {path}, which maps {inputs} inputs to {outputs} "
            f"outputs; use at most {min(inputs, outputs)}, or leave that target out of {_TARGETS}.",
        )


def _targets(axes: Any, config: LoraConfig) -> dict[str, int]:
    """Number of input axes by path."""
    flat: dict[str, tuple[str | None, ...]] = flatten_dict(axes, sep="/")
    found: dict[str, int] = {}
    for pattern in config.targets:
        matches = [path for path in flat if re.search(pattern, path)]
        if not matches:
            raise ConfigError(
                _TARGETS,
                f"{pattern!r} matches no parameter; their paths are like "
                f"{', '.join(list(flat)[:6])}.{_peer_hint(flat, config)}",
            )
        for path in matches:
            inputs = num_input_axes(flat[path])
            if inputs is None:
                raise ConfigError(
                    _TARGETS,
                    f"{pattern!r} matches {path}, which is no matrix between the residual stream "
                    "and a layer; end the pattern with $, or make it narrower.",
                )
            found[path] = inputs
    return {path: found[path] for path in flat if path in found}


def _peer_hint(paths: Iterable[str], config: LoraConfig) -> str:
    """What to type when the default targets meet layers of experts, which have no up and down."""
    if config.targets != ATTENTION_AND_MLP or not any(p.endswith("mlp/query") for p in paths):
        return ""
    return (
        " Experts (model.mlp.kind='peer') have none of these matrices; adapt attention alone with "
        f"--config.{_TARGETS}=\"('{ATTENTION_AND_MLP[0]}',)\"."
    )
