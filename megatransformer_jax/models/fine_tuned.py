"""The tree that a run keeps as its parameters, and how it becomes the model's.

Without LoRA they are the same: the tree of `init_params`. With LoRA the run keeps
{'base': that tree, its matrices perhaps int8, 'lora': the updates}.
"""

from typing import Any

import jax
from jaxtyping import Array, Key

from megatransformer_jax.config.fine_tuning import FineTuningConfig
from megatransformer_jax.models.int8_weights import (
    dequantize_params,
    quantize_params,
    quantized_axes,
)
from megatransformer_jax.models.lora import init_lora, lora_axes, merge_lora
from megatransformer_jax.models.megatransformer import MegaTransformer, init_params, param_axes

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
