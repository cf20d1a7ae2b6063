"""Options of self-attention that act before the kernel: norms of queries and keys, windows."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from megatransformer_jax.config.layers import AttentionConfig
from megatransformer_jax.config.model import MlpConfig, ModelConfig
from megatransformer_jax.models.megatransformer import layer_context
from megatransformer_jax.nn.attention import SelfAttention
from megatransformer_jax.nn.block import Block, Stack
from megatransformer_jax.nn.layer_sharing import LayerGroup, plan_groups
from megatransformer_jax.nn.parameters import weight_init
from megatransformer_jax.ops.masks import AttentionMask
from megatransformer_jax.ops.positions import apply_rotary
from megatransformer_jax.sharding.rules import Sharder
from megatransformer_jax.types import DTypePolicy

WIDTH, LENGTH, HEADS, GROUPS, EPS = 16, 5, 4, 2, 0.3
X = jax.random.normal(jax.random.key(0), (2, LENGTH, WIDTH))


def config_of(**attention):
    return ModelConfig(
        width=WIDTH,
        prelude_layers=5,
        core_layers=1,
        attention=AttentionConfig(num_heads=HEADS, num_kv_heads=GROUPS, **attention),
        mlp=MlpConfig(hidden_width=12),
    )


def parts_of(config):
    return config, weight_init(config, WIDTH), DTypePolicy(), Sharder(), "cpu"


def context_of(config):
    positions = jnp.broadcast_to(jnp.arange(LENGTH), (2, LENGTH))
    return layer_context(config, positions, AttentionMask(True, config.attention.window), WIDTH)


def normalized(x, scale, eps, axes):
    x = np.asarray(x, np.float64)
    return x / np.sqrt(np.mean(x**2, axis=axes, keepdims=True) + eps) * scale


# ------------------------------------------------------------------------------
# Norms of queries and keys.


@pytest.mark.parametrize("span", ["head", "width"])
@pytest.mark.parametrize(("after", "scaled"), [(False, True), (True, True), (True, False)])
def test_queries_and_keys_are_normalised_where_and_over_what_is_asked(span, after, scaled):
    config = config_of(
        qk_norm=True,
        qk_bias=True,
        qk_norm_span=span,
        qk_norm_after_rotary=after,
        qk_norm_scale=scaled,
        qk_norm_eps=EPS,
    )
    attend, context = SelfAttention(*parts_of(config)), context_of(config)
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: attend.init(jax.random.key(0), X, context))["params"]
    params = jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), jnp.float32), nn.meta.unbox(shapes)
    )
    assert ("query_scale" in params) == ("key_scale" in params) == scaled
    _, seen = attend.apply({"params": params}, X, context, mutable=["intermediates"])
    got = seen["intermediates"]["query_key_value"][0]
    fused = np.einsum("btd,dkgh->btkgh", X, params["qkv"])
    projected = fused[..., :-2, :].reshape(2, LENGTH, HEADS, -1), fused[..., -2, :]
    for name, heads, ours in zip(("query", "key"), projected, got[:2], strict=True):
        scale = params.get(f"{name}_scale", 1.0)
        shift = params[f"{name}_bias"]
        axes = (-2, -1) if span == "width" else -1

        def rotate(x):
            return apply_rotary(jnp.asarray(x, jnp.float32), context.rotary, "half")

        if after:
            wanted = normalized(rotate(heads + shift), scale, EPS, axes)
        else:
            wanted = rotate(normalized(heads, scale, EPS, axes) + shift)
        np.testing.assert_allclose(ours, wanted, rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------
# Windows of their own for the layers of a stack.


def test_kinds_are_grouped_by_their_shortest_repetition():
    groups = plan_groups(("s", "s", "f", "s", "s", "f", "f", "f", "s"))
    assert groups == [LayerGroup(0, 3, 2), LayerGroup(6, 1, 2), LayerGroup(8, 1, 1)]
    assert plan_groups("fffsss") == [LayerGroup(0, 1, 3), LayerGroup(3, 1, 3)]
    assert plan_groups("") == []


@pytest.mark.parametrize("remat", ["none", "full"])
def test_every_layer_has_its_window_laid_out_and_in_loops(remat):
    config = config_of(window=1, prelude_windows=(2, 0))
    windows = (2, None, 2, None, 2)
    assert config.windows("prelude") == windows
    assert config.windows("core") == (1,)
    _, *parts = parts_of(config)
    context, owners = context_of(config), tuple(range(5))
    looped = dataclasses.replace(config, scan_layers=True)
    stacks = [Stack(each, owners, *parts, remat, "prelude") for each in (config, looped)]
    params = nn.meta.unbox(stacks[0].init(jax.random.key(1), X, context))["params"]

    def by_stack(stack):
        return lambda params: jnp.sum(jnp.sin(stack.apply({"params": params}, X, context)))

    def by_hand(params):
        x, block = X, Block(*parts_of(config))
        for layer, window in enumerate(windows):
            seen = context.replace(mask=AttentionMask(True, window))
            x = block.apply({"params": params[f"layer_{layer}"]}, x, seen, layer)
        return jnp.sum(jnp.sin(x))

    wanted = jax.jit(jax.value_and_grad(by_hand))(params)
    for stack in stacks:
        run = jax.jit(jax.value_and_grad(by_stack(stack)))
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
            run(params),
            wanted,
        )
        # One loop of two layers per turn, and the fifth alone.
        has_loop = "stablehlo.while" in run.lower(params).as_text()
        assert has_loop == stack.config.scan_layers
    everywhere = dataclasses.replace(config, attention=AttentionConfig(HEADS, GROUPS, window=1))
    other = by_stack(Stack(everywhere, owners, *parts, remat, "prelude"))(params)
    assert abs(other - wanted[0]) > 1e-3
