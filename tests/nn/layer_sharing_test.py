"""Orders against the paper's algorithm, and shared stacks against explicit loops."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from megatransformer_jax.config.layers import SHARING_SCHEMES, AttentionConfig, SharingConfig
from megatransformer_jax.config.model import MlpConfig, ModelConfig
from megatransformer_jax.config.recurrence import RecurrenceConfig
from megatransformer_jax.models.cost.flops import forward_flops
from megatransformer_jax.models.cost.parameter_counts import (
    count_parameters,
    total_parameters,
)
from megatransformer_jax.models.megatransformer import abstract_params, build_model, layer_context
from megatransformer_jax.nn.block import Block, Stack
from megatransformer_jax.nn.layer_sharing import layer_owners, stack_owners
from megatransformer_jax.nn.parameters import weight_init
from megatransformer_jax.ops.masks import AttentionMask
from megatransformer_jax.sharding.rules import Sharder
from megatransformer_jax.types import DTypePolicy

WIDTH, HEADS, LENGTH = 8, 2, 5
SHARED = ModelConfig(
    vocab_size=16,
    width=WIDTH,
    max_length=8,
    prelude_layers=6,
    core_layers=0,
    coda_layers=0,
    attention=AttentionConfig(num_heads=HEADS),
    mlp=MlpConfig(hidden_width=12),
    sharing=SharingConfig(scheme="cycle_rev", prelude_unique=3),
)


def algorithm_1(scheme, num_layers, num_unique):
    """The paper's algorithm 1, counted from 1."""
    layers = {}
    for i in range(1, num_layers + 1):
        if scheme == "sequence":
            is_new = (i - 1) % (num_layers // num_unique) == 0
            layers[i] = len(set(layers.values())) + 1 if is_new else layers[i - 1]
        elif i <= num_unique:
            layers[i] = i
        elif scheme == "cycle" or i <= num_unique * (math.ceil(num_layers / num_unique) - 1):
            layers[i] = layers[((i - 1) % num_unique) + 1]
        else:
            layers[i] = layers[num_unique - ((i - 1) % num_unique)]
    return tuple(layer - 1 for layer in layers.values())


@pytest.mark.parametrize("scheme", SHARING_SCHEMES[1:])
def test_orders_are_the_papers(scheme):
    for num_unique in range(1, 5):
        for num_layers in range(num_unique, 13):
            if scheme == "sequence" and num_layers % num_unique:
                continue  # There the paper makes more layers than asked for.
            wanted = algorithm_1(scheme, num_layers, num_unique)
            assert layer_owners(scheme, num_layers, num_unique) == wanted


def test_orders_by_example():
    assert layer_owners("sequence", 6, 3) == (0, 0, 1, 1, 2, 2)
    assert layer_owners("cycle", 6, 3) == (0, 1, 2, 0, 1, 2)
    assert layer_owners("cycle_rev", 6, 3) == (0, 1, 2, 2, 1, 0)
    assert layer_owners("sequence", 5, 3) == (0, 0, 1, 1, 2)
    assert layer_owners("none", 3, 3) == (0, 1, 2)
    assert stack_owners(SHARED, "prelude") == (0, 1, 2, 2, 1, 0)
    assert stack_owners(SHARED, "coda") == ()
    with pytest.raises(ValueError, match="'mirror'"):
        layer_owners("mirror", 6, 3)
    with pytest.raises(ValueError, match="4 unique layers of 3"):
        layer_owners("cycle", 3, 4)


def test_parameters_are_those_of_the_unique_layers_and_flops_those_of_all():
    def costs(config):
        shapes = abstract_params(build_model(config, DTypePolicy(), Sharder(), "cpu"))
        return total_parameters(count_parameters(shapes)), forward_flops(config, LENGTH).total(0)

    unshared = dataclasses.replace(SHARED, sharing=SharingConfig())
    three = dataclasses.replace(unshared, prelude_layers=3)
    assert costs(SHARED) == (costs(three)[0], costs(unshared)[1])


def parts_of(config):
    return config, weight_init(config, WIDTH), DTypePolicy(), Sharder(), "cpu"


def stack_of(config, owners, remat="none"):
    _, *rest = parts_of(config)
    return Stack(config, owners, *rest, remat)


def context_of(config, deterministic=True):
    positions = jnp.broadcast_to(jnp.arange(LENGTH), (2, LENGTH))
    context = layer_context(config, positions, AttentionMask(True), WIDTH, deterministic)
    mask = jnp.linspace(0.5, 1.5, 6 * HEADS).reshape(6, HEADS)
    return context.replace(head_mask=mask)


def test_shared_layers_and_their_gradients_equal_an_explicit_loop():
    """Each layer has its own row of the head mask, whatever weights it uses."""
    x = jax.random.normal(jax.random.key(0), (2, LENGTH, WIDTH))
    owners = stack_owners(SHARED, "prelude")
    stack, context = stack_of(SHARED, owners), context_of(SHARED)
    params = nn.meta.unbox(stack.init(jax.random.key(1), x, context))["params"]
    assert sorted(params) == ["layer_0", "layer_1", "layer_2"]

    def by_stack(params):
        return jnp.sum(jnp.sin(stack.apply({"params": params}, x, context)))

    def by_loop(params):
        state = x
        for layer, number in enumerate([1, 2, 3, 3, 2, 1]):
            block = Block(*parts_of(SHARED))
            weights = {"params": params[f"layer_{number - 1}"]}
            state = block.apply(weights, state, context, layer)
        return jnp.sum(jnp.sin(state))

    ours, wanted = (jax.jit(jax.value_and_grad(f))(params) for f in (by_stack, by_loop))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), ours, wanted)
    reordered = stack_of(SHARED, (0, 1, 2, 0, 1, 2)).apply({"params": params}, x, context)
    assert abs(float(jnp.sum(jnp.sin(reordered)) - ours[0])) > 1e-3


@pytest.mark.parametrize("remat", ["none", "full"])
def test_uses_of_the_same_weights_drop_different_units(remat):
    config = dataclasses.replace(SHARED, residual_dropout_rate=0.5)
    x = jax.random.normal(jax.random.key(0), (2, LENGTH, WIDTH))
    stack, context = stack_of(config, (0, 0), remat), context_of(config, deterministic=False)
    rngs = {"params": jax.random.key(1), "dropout": jax.random.key(2)}
    params = stack.init(rngs, x, context)["params"]
    _, seen = stack.apply(
        {"params": params},
        x,
        context,
        rngs=rngs,
        capture_intermediates=lambda module, _: isinstance(module, nn.Dropout),
        mutable=["intermediates"],
    )
    for dropout in ("Dropout_0", "Dropout_1"):
        first, second = seen["intermediates"]["layer_0"][dropout]["__call__"]
        assert not np.array_equal(first == 0, second == 0)


def test_a_shared_core_and_its_recurrence_have_one_set_of_weights():
    config = dataclasses.replace(
        SHARED,
        prelude_layers=1,
        core_layers=2,
        recurrence=RecurrenceConfig(state_init="zero"),
        sharing=SharingConfig(scheme="cycle", core_unique=1),
    )
    shapes = abstract_params(build_model(config, DTypePolicy(), Sharder(), "cpu"))
    assert sorted(shapes["core"]["layers"]) == ["layer_0"]
