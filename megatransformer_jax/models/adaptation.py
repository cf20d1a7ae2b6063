"""What fine-tuning does to a model's weights: low-rank updates, int8 storage.

With LoRA (arXiv 2106.09685) a target W of shape (*inputs, *outputs) gets a [*inputs, rank] and
b [rank, *outputs], and the model uses W + alpha / rank * a b. The product is added to W once per
pass and not to each layer's output: the core uses a weight in every iteration, so that two thin
products per iteration and token would cost more than one addition to W, and fused kernels and every
other reader of weights need not know.
"""

import math
import re
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Key

from megatransformer_jax.config.fine_tuning import ATTENTION_AND_MLP, FineTuningConfig, LoraConfig
from megatransformer_jax.config.option import ConfigError
from megatransformer_jax.extras import import_extra
from megatransformer_jax.models.megatransformer import MegaTransformer, init_params, param_axes

# ------------------------------------------------------------------------------
# Low-rank updates next to frozen weights.

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
      ConfigError: if a pattern matches no parameter, or one that is not a matrix, or if the rank is
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
                    f"{pattern!r} matches {path}, which is not a matrix between the residual "
                    "stream and a layer; end the pattern with $, or make it narrower.",
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


# ------------------------------------------------------------------------------
# Frozen matrices as int8 with a float32 scale per output channel.
#
# Symmetric: the largest value of a channel becomes 127. Storage is qwix's `QArray`, a pytree of the
# whole numbers (`qvalue`) and the scales (`scale`, of length 1 along the input). They become
# float32 once per pass, before the model reads them.


def quantize_params(params: Any, axes: Any) -> Any:
    """The tree with a `QArray` in place of every matrix; vectors stay as they are.

    Args:
      params: nested dicts of float32 arrays.
      axes: logical names of every axis, from `param_axes`.

    Raises:
      ConfigError: if qwix is not installed.
    """
    qwix = _qwix()

    def quantize(names: tuple[str | None, ...], weight: jax.Array) -> Any:
        channels = output_axes(names)
        if channels is None:
            return weight
        return qwix.quantize(weight, jnp.int8, channelwise_axes=channels)

    return jax.tree.map(quantize, axes, params, is_leaf=is_axes)


def dequantize_params(params: Any) -> Any:
    """The tree with float32 matrices again."""

    def dequantize(leaf: Any) -> Any:
        return _qwix().dequantize(leaf) if is_quantized(leaf) else leaf

    return jax.tree.map(dequantize, params, is_leaf=is_quantized)


def quantized_axes(axes: Any, quantized: Any) -> Any:
    """Logical axis names in the tree of `quantize_params`; `quantized` is that tree of shapes."""

    def rename(names: tuple[str | None, ...], leaf: Any) -> Any:
        if not is_quantized(leaf):
            return names
        channels = output_axes(names) or ()
        # The scale has length 1 along the input: nothing to cut.
        scale = tuple(name if axis in channels else None for axis, name in enumerate(names))
        return leaf.replace(qvalue=names, scale=scale)

    return jax.tree.map(rename, axes, quantized, is_leaf=is_axes)


def is_quantized(leaf: Any) -> bool:
    """Whether a leaf is stored as whole numbers and scales."""
    return hasattr(leaf, "qvalue")


def _qwix() -> Any:
    return import_extra("qwix", "qlora", "fine_tuning.base_precision='int8'")


# ------------------------------------------------------------------------------
# Which axes of a weight are its input and which its output, from their logical names.
#
# Kernels are fused: [D, K, G+2, H] for queries, keys and values, [D, 2, F] for gate and up, [N, H,
# D] for the attention's output. The axis `embed` (the residual stream) tells which side is which.

# The first axis of a table, whose rows are looked up; as a head its rows are the outputs.
_ROWS = ("vocab", "experts", None)


def num_input_axes(axes: tuple[str | None, ...]) -> int | None:
    """How many leading axes are the input; None if this is not a matrix.

    Examples:
      >>> num_input_axes(("embed", "kv_heads", None, None))
      1
      >>> num_input_axes(("heads", None, "embed"))
      2
    """
    if len(axes) < 2:
        return None
    if axes[0] == "embed":
        return 1
    return len(axes) - 1 if axes[-1] == "embed" else None


def output_axes(axes: tuple[str | None, ...]) -> tuple[int, ...] | None:
    """The numbers of the axes that make an output channel; None if this is not a matrix.

    Of a table (embeddings, learned positions, head, experts) it is the rows.
    """
    inputs = num_input_axes(axes)
    if inputs is None:
        return None
    if axes[0] in _ROWS:
        return (0,)
    return tuple(range(inputs, len(axes)))


def is_axes(node: Any) -> bool:
    """Whether a node of a tree of axes is the names of one array, and no branch."""
    return isinstance(node, tuple)


# ------------------------------------------------------------------------------
# The tree that a run keeps as its parameters, and how it becomes the model's.
#
# Without LoRA they are the same: the tree of `init_params`. With LoRA the run keeps
# {'base': that tree, its matrices perhaps int8, 'lora': the updates}.

BASE, LORA = "base", "lora"


def kept_params(
    model: MegaTransformer, config: FineTuningConfig, params: Any, key: Key[Array, ""]
) -> Any:
    """What a run keeps at its start.

    Args:
      model: the model.
      config: decides the form.
      params: the model's parameters, as `init_params`.
      key: randomness of LoRA's updates.

    Raises:
      ConfigError: if a target of LoRA does not fit the model.
    """
    if not config.lora.rank:
        return params
    axes = param_axes(model)
    lora = init_lora(params, axes, config.lora, key)
    if config.base_precision == "int8":
        params = quantize_params(params, axes)
    return {BASE: params, LORA: lora}


def kept_axes(model: MegaTransformer, config: FineTuningConfig) -> Any:
    """Logical axis names in the tree of `kept_params`."""
    axes = param_axes(model)
    if not config.lora.rank:
        return axes
    updates = lora_axes(axes, config.lora)
    if config.base_precision == "int8":
        shapes = jax.eval_shape(
            lambda key: quantize_params(init_params(model, key), axes), jax.random.key(0)
        )
        axes = quantized_axes(axes, shapes)
    return {BASE: axes, LORA: updates}


def model_params(kept: Any, config: FineTuningConfig) -> Any:
    """The tree that `model.apply` takes. Differentiable in the float32 leaves.

    With LoRA it has every weight in float32 with its update added, so it takes as much memory as
    the model without LoRA; the training step makes it once per micro-batch.
    """
    if not config.lora.rank:
        return kept
    return merge_lora(dequantize_params(kept[BASE]), kept[LORA], config.lora)
