"""int8 weights: one scale per output channel, vectors untouched, the model nearly the same."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from megatransformer_jax.config.option import UserError
from megatransformer_jax.models.adaptation import (
    dequantize_params,
    is_quantized,
    quantize_params,
    quantized_axes,
)

AXES = {
    "qkv": ("embed", "kv_heads", None, None),
    "output": ("heads", None, "embed"),
    "embedding": ("vocab", "embed"),
    "bias": ("kv_heads", None),
    "scale": (None,),
}
SHAPES = {
    "qkv": (6, 2, 3, 4),
    "output": (4, 4, 6),
    "embedding": (10, 6),
    "bias": (2, 4),
    "scale": (6,),
}
# Axes that a channel's scale is shared along.
INPUTS = {"qkv": (0,), "output": (0, 1), "embedding": (1,)}


@pytest.fixture(scope="module")
def weights():
    rng = np.random.default_rng(0)
    return {name: jnp.asarray(rng.normal(size=shape), "float32") for name, shape in SHAPES.items()}


def test_weights_are_whole_multiples_of_their_channels_scale(weights):
    """Against the formula: scale = absmax / 127, value = round(weight / scale)."""
    stored = quantize_params(weights, AXES)
    restored = dequantize_params(stored)
    for name, inputs in INPUTS.items():
        weight = np.asarray(weights[name])
        scale = np.abs(weight).max(inputs, keepdims=True) / 127
        assert stored[name].qvalue.dtype == jnp.int8
        np.testing.assert_allclose(stored[name].scale, scale, rtol=1e-2)
        error = np.abs(np.asarray(restored[name]) - weight)
        assert np.all(error <= 0.505 * scale)
        assert np.mean(error > 0.1 * scale) > 0.5  # They are rounded indeed.
    for name in ("bias", "scale"):
        assert restored[name] is stored[name] is weights[name]


def test_axes_follow_the_stored_form(weights):
    stored = quantize_params(weights, AXES)
    names = quantized_axes(AXES, stored)
    assert names["qkv"].qvalue == AXES["qkv"]
    assert names["qkv"].scale == (None, "kv_heads", None, None)
    assert names["output"].scale == (None, None, "embed")
    assert names["embedding"].scale == ("vocab", None)
    assert names["bias"] == AXES["bias"] and not is_quantized(names["bias"])
    # One tree of names per array, as placing them on a mesh needs it.
    jax.tree.map(lambda leaf, axes: len(axes) == leaf.ndim or pytest.fail(), stored, names)


def test_without_the_package_the_error_names_the_extra(weights, monkeypatch):
    monkeypatch.setitem(sys.modules, "qwix", None)
    with pytest.raises(UserError, match=r"fine_tuning\.base_precision='int8': qwix.*\[qlora\]"):
        quantize_params(weights, AXES)
