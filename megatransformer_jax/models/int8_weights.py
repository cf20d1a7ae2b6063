"""Frozen matrices as int8 with a float32 scale per output channel.

Symmetric: the largest value of a channel becomes 127. Storage is qwix's `QArray`, a pytree of the
whole numbers (`qvalue`) and the scales (`scale`, of length 1 along the input). They become float32
once per pass, before the model reads them.
"""

from typing import Any

import jax
import jax.numpy as jnp

from megatransformer_jax.config.option import ConfigError
from megatransformer_jax.models.weight_axes import is_axes, output_axes


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
    try:
        import qwix  # noqa: PLC0415 (an extra: imported only when asked for)
    except ImportError as error:
        raise ConfigError(
            "fine_tuning.base_precision",
            "'int8' needs the package qwix, which is not installed; run `pip install -e .[qlora]` "
            "in the checkout, or use float32.",
        ) from error
    return qwix
