"""Stacks in loops equal stacks laid out, and compile to programs of one size."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from megatransformer_jax.config.layers import AttentionConfig
from megatransformer_jax.config.model import MlpConfig, ModelConfig
from megatransformer_jax.models.megatransformer import layer_context
from megatransformer_jax.nn.block import SOWN_BY_LAYERS, Stack
from megatransformer_jax.nn.layer_sharing import layer_owners, plan_loops
from megatransformer_jax.nn.parameters import weight_init
from megatransformer_jax.ops.masks import AttentionMask
from megatransformer_jax.sharding.rules import Sharder
from megatransformer_jax.types import DTypePolicy

WIDTH, HEADS, LENGTH = 8, 2, 5
LAID_OUT = ModelConfig(
    width=WIDTH, attention=AttentionConfig(num_heads=HEADS), mlp=MlpConfig(hidden_width=12)
)
SCANNED = dataclasses.replace(LAID_OUT, scan_layers=True)
X = jax.random.normal(jax.random.key(0), (2, LENGTH, WIDTH))


def stack_of(config, owners, remat="none"):
    return Stack(config, owners, weight_init(config, WIDTH), DTypePolicy(), Sharder(), "cpu", remat)


def context_of(num_layers, deterministic=True):
    positions = jnp.broadcast_to(jnp.arange(LENGTH), (2, LENGTH))
    context = layer_context(LAID_OUT, positions, AttentionMask(True), WIDTH, deterministic)
    mask = jnp.linspace(0.5, 1.5, num_layers * HEADS).reshape(num_layers, HEADS)
    return context.replace(head_mask=mask)


def params_of(owners):
    stack, context = stack_of(SCANNED, owners), context_of(len(owners))
    variables = jax.jit(lambda key: stack.init(key, X, context))(jax.random.key(1))
    return nn.meta.unbox(variables)["params"]


@pytest.mark.parametrize("scheme", ["sequence", "cycle", "cycle_rev"])
def test_loops_give_every_layer_its_weights_in_order(scheme):
    for num_unique in range(1, 5):
        for num_layers in range(num_unique, 13):
            owners = layer_owners(scheme, num_layers, num_unique)
            loops = plan_loops(owners)
            visited = []
            for loop in loops:
                for places in loop.places:
                    pairs = list(zip(loop.owners, places, strict=True))
                    for owner, layers in reversed(pairs) if loop.is_reversed else pairs:
                        visited += [(int(layer), owner) for layer in layers]
            assert visited == list(enumerate(owners))
            if scheme == "cycle" or num_layers % num_unique == 0:
                assert len(loops) <= 2
    assert plan_loops(()) == []


@pytest.mark.parametrize(
    ("scheme", "num_layers", "num_unique", "remat"),
    # The second has two rounds in one loop, then a reversed one.
    [("none", 2, 2, "full"), ("cycle_rev", 6, 2, "dots")],
)
def test_outputs_and_gradients_equal_those_of_layers_laid_out(
    scheme, num_layers, num_unique, remat
):
    owners = layer_owners(scheme, num_layers, num_unique)
    params, context = params_of(owners), context_of(num_layers)

    def value_and_gradients(config):
        stack = stack_of(config, owners, remat)

        def loss(params, x, mask):
            out = stack.apply({"params": params}, x, context.replace(head_mask=mask))
            return jnp.sum(jnp.sin(out)), out

        differentiate = jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)
        return jax.jit(differentiate)(params, X, context.head_mask)

    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
        value_and_gradients(SCANNED),
        value_and_gradients(LAID_OUT),
    )


def test_the_program_has_a_loop_and_does_not_grow_with_depth():
    def text(config, num_layers, mutable=False):
        owners = tuple(range(num_layers))
        stack, context = stack_of(config, owners), context_of(num_layers)
        shapes = jax.eval_shape(lambda: stack.init(jax.random.key(0), X, context))["params"]
        run = jax.jit(lambda params: stack.apply({"params": params}, X, context, mutable=mutable))
        return run.lower(nn.meta.unbox(shapes)).as_text()

    shallow, deep = text(SCANNED, 3), text(SCANNED, 9)
    assert "stablehlo.while" in deep and "stablehlo.while" not in text(LAID_OUT, 3)
    # What is sown outside of layers does not matter, what they sow does.
    assert "stablehlo.while" in text(SCANNED, 3, ["last_state"])
    for collection in SOWN_BY_LAYERS:
        assert "stablehlo.while" not in text(SCANNED, 3, [collection])
    products = [program.count("stablehlo.dot_general") for program in (shallow, deep)]
    assert products[0] == products[1] > 0
    # The weights are still stacked one by one.
    assert len(deep) < 2 * len(shallow)
    assert len(text(LAID_OUT, 9)) > 2.5 * len(text(LAID_OUT, 3))


def test_layers_drop_different_units_and_sown_values_are_not_lost():
    """Updates of 1 whatever the input, halved in number and doubled: their masks show."""
    config = dataclasses.replace(
        SCANNED,
        residual_dropout_rate=0.5,
        mlp=dataclasses.replace(SCANNED.mlp, bias=True),
    )
    stack, context = stack_of(config, (0, 0)), context_of(2, deterministic=False)
    shapes = jax.eval_shape(lambda: stack.init(jax.random.key(0), X, context_of(2)))["params"]
    params = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), nn.meta.unbox(shapes))
    params["layer_0"]["mlp"]["down_bias"] += 1.0

    @jax.jit
    def added(key):
        return stack.apply({"params": params}, X, context, rngs={"dropout": key}) - X

    once = np.round(added(jax.random.key(1)), 4)
    assert set(np.unique(once)) == {0, 2, 4}
    np.testing.assert_array_equal(once, np.round(added(jax.random.key(1)), 4))
    assert np.any(once != np.round(added(jax.random.key(2)), 4))

    _, sown = stack.apply({"params": params}, X, context_of(2), mutable=["residual_updates"])
    assert len(sown["residual_updates"]["layer_0"]["mlp_update"]) == 2
