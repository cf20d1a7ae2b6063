"""Norms against NumPy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from megatransformer_jax.config.model import NormConfig
from megatransformer_jax.nn.norms import Norm


def reference(x, config, scale, bias):
    x = x.astype(np.float64)
    if config.kind == "layernorm":
        x = x - x.mean(-1, keepdims=True)
    y = x / np.sqrt((x**2).mean(-1, keepdims=True) + config.eps) * scale
    return y + bias


@pytest.mark.parametrize(
    "config",
    [
        NormConfig(kind="rmsnorm", eps=1e-5),
        NormConfig(kind="layernorm"),
        NormConfig(kind="layernorm", bias=True),
    ],
)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_equals_numpy(config, dtype):
    rng = np.random.default_rng(0)
    x = jnp.asarray(5 + 3 * rng.normal(size=(2, 3, 16)), dtype)
    scale, bias = rng.normal(size=(2, 16)).astype(np.float32)
    params = {"scale": jnp.asarray(scale)}
    if config.bias:
        params["bias"] = jnp.asarray(bias)
    out = Norm(config).apply({"params": params}, x)
    assert out.dtype == dtype
    wanted = reference(np.asarray(x), config, scale, bias if config.bias else 0.0)
    # bfloat16 keeps 8 bits: the result of a float32 computation is off by its last bit at most.
    tolerance = 1e-5 if dtype == jnp.float32 else 2**-8
    np.testing.assert_allclose(np.asarray(out, np.float64), wanted, rtol=tolerance, atol=tolerance)


def test_parameters_are_float32_and_start_neutral():
    norm = Norm(NormConfig(kind="layernorm", bias=True))
    params = norm.init(jax.random.key(0), jnp.ones((1, 2, 4), jnp.bfloat16))["params"]
    assert np.array_equal(params["scale"].value, np.ones(4, np.float32))
    assert np.array_equal(params["bias"].value, np.zeros(4, np.float32))
