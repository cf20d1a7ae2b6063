"""Group normalisation against NumPy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from megatransformer_jax.nn.norms import EPS, GroupNorm, group_normalize

GROUPS = 2


def normalized(x):
    grouped = np.asarray(x, np.float64).reshape(x.shape[0], -1, GROUPS, x.shape[-1] // GROUPS)
    mean = grouped.mean((1, 3), keepdims=True)
    variance = grouped.var((1, 3), keepdims=True)
    return ((grouped - mean) / np.sqrt(variance + EPS)).reshape(x.shape)


@pytest.mark.parametrize("shape", [(3, 2, 5, 6), (3, 7, 6)])
def test_equals_numpy(shape):
    x = 3 + jax.random.normal(jax.random.key(0), shape)
    scale, bias, own_scale, own_bias = jax.random.normal(jax.random.key(1), (4, 3, 6))
    module = GroupNorm(GROUPS)
    params = {"params": {"scale": own_scale[0], "bias": own_bias[0]}}
    wide = (3, *(1,) * (len(shape) - 2), 6)
    plain = normalized(x) * np.asarray(own_scale[0]) + np.asarray(own_bias[0])
    np.testing.assert_allclose(jax.jit(module.apply)(params, x), plain, atol=2e-5)
    modulated = plain * (1 + np.asarray(scale).reshape(wide)) + np.asarray(bias).reshape(wide)
    np.testing.assert_allclose(jax.jit(module.apply)(params, x, scale, bias), modulated, atol=5e-5)


def test_starts_without_a_scale_and_keeps_the_type():
    x = jax.random.normal(jax.random.key(0), (2, 4, 6), jnp.bfloat16)
    module = GroupNorm(GROUPS)
    output = jax.jit(module.apply)(nn.meta.unbox(module.init(jax.random.key(0), x)), x)
    assert output.dtype == jnp.bfloat16
    np.testing.assert_allclose(output.astype(np.float32), normalized(x), atol=0.03)


def test_groups_must_divide_the_channels():
    with pytest.raises(ValueError, match="6 channels do not make 4 groups"):
        group_normalize(jnp.ones((1, 2, 6)), 4, jnp.ones((1, 6)), jnp.ones((1, 6)))
