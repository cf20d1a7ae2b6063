"""How a block's updates join the residual stream."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from megatransformer_jax.config.layers import AttentionConfig
from megatransformer_jax.config.model import MlpConfig, ModelConfig, NormConfig
from megatransformer_jax.config.recurrence import RecurrenceConfig
from megatransformer_jax.models.megatransformer import layer_context
from megatransformer_jax.nn.attention import SelfAttention
from megatransformer_jax.nn.block import Block, Stack
from megatransformer_jax.nn.mlp import Mlp
from megatransformer_jax.nn.parameters import weight_init
from megatransformer_jax.ops.masks import AttentionMask
from megatransformer_jax.sharding.rules import Sharder
from megatransformer_jax.training.optimizers import decay_mask
from megatransformer_jax.types import DTypePolicy

WIDTH, LENGTH = 8, 5
X = jax.random.normal(jax.random.key(0), (2, LENGTH, WIDTH))


def config_of(residual, placement):
    return ModelConfig(
        width=WIDTH,
        core_layers=0,
        attention=AttentionConfig(num_heads=2),
        mlp=MlpConfig(hidden_width=12),
        norm=NormConfig(placement=placement),
        recurrence=RecurrenceConfig(),
        residual=residual,
    )


def parts_of(config):
    return config, weight_init(config, WIDTH), DTypePolicy(), Sharder(), "cpu"


def context_of(config):
    positions = jnp.broadcast_to(jnp.arange(LENGTH), (2, LENGTH))
    return layer_context(config, positions, AttentionMask(True), WIDTH)


def init(module, *arguments):
    variables = jax.jit(lambda key: module.init(key, *arguments))(jax.random.key(1))
    return nn.meta.unbox(variables)["params"]


@pytest.mark.parametrize("placement", ["none", "pre"])
def test_rezero_starts_as_the_identity_and_only_its_alphas_learn_at_first(placement):
    config = config_of("rezero", placement)
    _, *rest = parts_of(config)
    stack, context = Stack(config, (0, 1), *rest), context_of(config)
    params = init(stack, X, context)

    @jax.jit
    def value_and_gradients(params):
        def loss(params):
            out = stack.apply({"params": params}, X, context)
            return jnp.sum(jnp.sin(3 * out)), out

        return jax.value_and_grad(loss, has_aux=True)(params)

    (_, out), gradients = value_and_gradients(params)
    np.testing.assert_array_equal(out, X)
    for path, gradient in jax.tree_util.tree_leaves_with_path(gradients):
        is_alpha = path[-1].key.endswith("_residual_scale")
        assert (jnp.max(jnp.abs(gradient)) > 0) == is_alpha, path
        assert not is_alpha or gradient.shape == ()
    assert not any(
        decayed
        for path, decayed in jax.tree_util.tree_leaves_with_path(decay_mask(params))
        if path[-1].key.endswith("_residual_scale")
    )
    assert any("norm" in name for name in params["layer_0"]) == (placement != "none")


def rms(x, scale):
    return x / np.sqrt(np.mean(np.square(x), axis=-1, keepdims=True) + 1e-6) * scale


@pytest.mark.parametrize(
    ("residual", "placement"), [("rezero", "none"), ("admin", "post"), ("plain", "output")]
)
def test_a_block_is_its_formula(residual, placement):
    config = config_of(residual, placement)
    _, inits, policy, *_ = parts = parts_of(config)
    block, context = Block(*parts), context_of(config)
    params = init(block, X, context, 0)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda p: p + 0.3 * rng.normal(size=p.shape).astype(np.float32), params)

    def attend(x):
        return SelfAttention(*parts).apply({"params": params["attention"]}, x, context)

    def feed_forward(x):
        return Mlp(config.mlp, inits, policy).apply({"params": params["mlp"]}, x, True)

    x = X
    for name, layer in (("attention", attend), ("mlp", feed_forward)):
        update = np.asarray(layer(x))
        scale = np.asarray(params.get(f"{name}_residual_scale", 1.0))
        if placement == "output":
            x = np.asarray(x) + rms(update, params[f"{name}_norm_out"]["scale"])
        elif residual == "rezero":
            x = np.asarray(x) + scale * update
        else:
            x = rms(scale * np.asarray(x) + update, params[f"{name}_norm_out"]["scale"])
        x = jnp.asarray(x)
    np.testing.assert_allclose(block.apply({"params": params}, X, context, 0), x, atol=1e-5)
