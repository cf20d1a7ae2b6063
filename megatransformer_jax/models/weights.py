"""Parameters as passes compute with them: their types, and how they lie on the device."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.layout import Format, Layout
from jax.sharding import Sharding

from megatransformer_jax.models.megatransformer import MegaTransformer, abstract_params
from megatransformer_jax.nn.quantized import is_quantized_matrix


def computed_types(model: MegaTransformer) -> Any:
    """The tree of `init_params` with shapes, and for matrices the type that passes compute in.

    Vectors (norm scales, biases) are float32 in every pass.
    """
    policy = dataclasses.replace(model.policy, param=model.policy.compute)
    return abstract_params(model.copy(policy=policy))


def computed_weights(model: MegaTransformer, params: Any) -> Any:
    """Parameters in the types that passes compute in, on the device.

    Every pass rounds matrices so. A caller of many passes with the same parameters rounds them
    once, and the device then holds nothing else. On a TPU they also lie in the order of axes in
    which passes read them, see `read_format`. The results are the same.

    Args:
      model: the model.
      params: of it; NumPy arrays are rounded on the host before they are sent. Parameters that are
        held in fewer bits already, and those of quantised models, keep their types.
    """

    def send(leaf: Any) -> Any:
        return leaf if is_quantized_matrix(leaf) else jnp.asarray(leaf)

    def to_compute(leaf: Any, shape: jax.ShapeDtypeStruct) -> Any:
        array = send(leaf.astype(shape.dtype) if leaf.dtype == model.policy.param else leaf)
        place = read_format(model, array.ndim, array.sharding)
        return array if place is array.sharding else jax.device_put(array, place)

    leaves = jax.tree.leaves(params, is_leaf=is_quantized_matrix)
    if any(map(is_quantized_matrix, leaves)):
        return jax.tree.map(send, params, is_leaf=is_quantized_matrix)
    return jax.tree.map(to_compute, params, computed_types(model))


def read_format(model: MegaTransformer, ndim: int, sharding: Sharding) -> Sharding | Format:
    """How a parameter lies in a device's memory, so that no pass copies it into another order.

    XLA would choose the order of axes in which an array takes the least memory. On a TPU this is
    often another one than products read, and then each call copies the matrix first.
    """
    if model.platform != "tpu" or ndim < 2:
        return sharding
    return Format(Layout(tuple(range(ndim))), sharding)
