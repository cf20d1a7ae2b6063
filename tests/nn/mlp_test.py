"""Feed-forward layers and activations against NumPy and SciPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from flax import linen as nn

from megatransformer_jax.config.layers import AttentionConfig
from megatransformer_jax.config.model import ACTIVATIONS, MlpConfig, ModelConfig
from megatransformer_jax.nn.mlp import Mlp, get_activation
from megatransformer_jax.nn.parameters import weight_init
from megatransformer_jax.types import DTypePolicy

WIDTH, HIDDEN = 6, 10
REFERENCE = {
    "gelu": lambda x: x * scipy.special.ndtr(x),
    "gelu_tanh": lambda x: 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))),
    "relu": lambda x: np.maximum(x, 0),
    "relu_squared": lambda x: np.maximum(x, 0) ** 2,
    "relu_squared_half": lambda x: np.maximum(x, 0) ** 2 / 2,
    "silu": lambda x: x * scipy.special.expit(x),
    "sigmoid": scipy.special.expit,
    "tanh": np.tanh,
    "identity": lambda x: x,
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activation_equals_its_formula(name):
    x = np.linspace(-4, 4, 41)
    ours = get_activation(name)(jnp.asarray(x, jnp.float32))
    np.testing.assert_allclose(ours, REFERENCE[name](x), rtol=1e-5, atol=1e-6)


def test_unknown_activation_is_an_error():
    with pytest.raises(ValueError, match="'swish9'"):
        get_activation("swish9")


@pytest.mark.parametrize("kind", ["mlp", "gated"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activation", ["silu", "gelu", "relu", "sigmoid"])
def test_equals_numpy(kind, bias, activation):
    config = MlpConfig(kind=kind, hidden_width=HIDDEN, activation=activation, bias=bias)
    inits = weight_init(ModelConfig(width=WIDTH, attention=AttentionConfig(num_heads=1)), WIDTH)
    module = Mlp(config, inits, DTypePolicy())
    x = jax.random.normal(jax.random.key(0), (2, 3, WIDTH))
    params = nn.meta.unbox(module.init(jax.random.key(1), x, True))["params"]
    params = jax.tree.map(lambda p: p + 0.1 * jax.random.normal(jax.random.key(2), p.shape), params)
    out = module.apply({"params": params}, x, True)

    weights = {name: np.asarray(value, np.float64) for name, value in params.items()}
    hidden = np.einsum("btd,dpf->btpf", np.asarray(x, np.float64), weights["up"])
    if bias:
        hidden = hidden + weights["up_bias"]
    inner = REFERENCE[activation](hidden[..., 0, :])
    if kind == "gated":
        inner = inner * hidden[..., 1, :]
    wanted = inner @ weights["down"] + (weights["down_bias"] if bias else 0)
    np.testing.assert_allclose(out, wanted, rtol=1e-5, atol=1e-5)


def test_dropout_acts_only_in_training():
    config = MlpConfig(hidden_width=HIDDEN, dropout_rate=0.5)
    inits = weight_init(ModelConfig(width=WIDTH, attention=AttentionConfig(num_heads=1)), WIDTH)
    module = Mlp(config, inits, DTypePolicy())
    x = jax.random.normal(jax.random.key(0), (2, 3, WIDTH))
    params = module.init(jax.random.key(1), x, True)
    still = module.apply(params, x, True)
    np.testing.assert_array_equal(still, module.apply(params, x, True))
    dropped = module.apply(params, x, False, rngs={"dropout": jax.random.key(2)})
    assert np.max(np.abs(dropped - still)) > 1e-4
