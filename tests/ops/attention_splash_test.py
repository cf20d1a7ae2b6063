"""Splash attention without a TPU: interpreted and compared to XLA, and lowered."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_reference import attend
from jax.sharding import Mesh

from megatransformer_jax.ops.attention_splash import attention_splash
from megatransformer_jax.ops.attention_xla import LogitTerms, attention_xla
from megatransformer_jax.ops.masks import AttentionMask
from megatransformer_jax.sharding.rules import MESH_AXES, Sharder

T, S, H = 128, 256, 64
SEGMENTS = jnp.asarray(np.arange(S)[None].repeat(2, 0) // [[50], [150]], jnp.int32)


def inputs(kv_heads=2, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = ((2, T, 4, H), (2, S, kv_heads, H), (2, S, kv_heads, H))
    return [jax.random.normal(k, s, dtype) for k, s in zip(keys, shapes, strict=True)]


def masks(offset):
    rows = slice(offset, offset + T)
    return {
        "causal": AttentionMask(query_offset=offset),
        "full": AttentionMask(is_causal=False, query_offset=offset),
        "window_segments": AttentionMask(
            window=40,
            query_offset=offset,
            query_segment_ids=SEGMENTS[:, rows],
            key_segment_ids=SEGMENTS,
        ),
    }


@pytest.mark.parametrize(
    ("name", "offset", "softcap"),
    [("causal", 128, 5.0), ("window_segments", 0, None)],
)
def test_equals_xla_in_value_and_gradient(name, offset, softcap):
    mask = masks(offset)[name]
    arrays = inputs()

    def splash(*arrays):
        return attention_splash(
            *arrays, mask, logit_softcap=softcap, sharder=Sharder(), interpret=True
        )

    output, pull = jax.vjp(splash, *arrays)
    expected, expected_pull = jax.vjp(
        lambda *arrays: attention_xla(*arrays, mask, terms=LogitTerms(softcap)), *arrays
    )
    np.testing.assert_allclose(output, expected, atol=5e-6)
    for gradient, wanted in zip(pull(arrays[0]), expected_pull(arrays[0]), strict=True):
        np.testing.assert_allclose(gradient, wanted, atol=2e-5)
    if name == "window_segments":
        blind = np.asarray(mask.query_segment_ids) == 0
        assert blind.any()
        assert np.all(np.asarray(output)[blind] == 0.0)


@pytest.mark.parametrize(("width", "kv_heads"), [(96, 2), (80, 1), (16, 1)])
def test_heads_of_any_width_equal_xla_in_value_and_gradient(width, kv_heads):
    keys = jax.random.split(jax.random.key(1), 4)
    heads = (2, kv_heads, kv_heads, 2)  # of query, key, value and of the output's gradient
    *arrays, pulled = [
        jax.random.normal(key, (2, T, number, width))
        for key, number in zip(keys, heads, strict=True)
    ]
    mask = AttentionMask(query_segment_ids=SEGMENTS[:, :T], key_segment_ids=SEGMENTS[:, :T])

    def splash(*arrays):
        return attention_splash(*arrays, mask, sharder=Sharder(), interpret=True)

    output, pull = jax.vjp(splash, *arrays)
    expected, expected_pull = jax.vjp(lambda *arrays: attention_xla(*arrays, mask), *arrays)
    np.testing.assert_allclose(output, expected, atol=1e-5)
    for gradient, wanted in zip(pull(pulled), expected_pull(pulled), strict=True):
        np.testing.assert_allclose(gradient, wanted, atol=1e-5)


@pytest.mark.parametrize(("name", "offset"), [("full", 0), ("window_segments", 128)])
def test_equals_xla_with_one_kv_head(name, offset):
    mask, arrays = masks(offset)[name], inputs(kv_heads=1)
    output = attention_splash(*arrays, mask, sharder=Sharder(), interpret=True)
    np.testing.assert_allclose(output, attention_xla(*arrays, mask), atol=5e-6)


def test_each_device_runs_its_batch_and_heads():
    mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 1, 2, 1), MESH_AXES)
    mask, arrays = masks(0)["window_segments"], inputs()
    sharder = Sharder(mesh)
    output = attention_splash(*arrays, mask, sharder=sharder, interpret=True)
    assert output.sharding.is_equivalent_to(sharder.sharding("batch", None, "heads", None), 4)
    np.testing.assert_allclose(output, attention_xla(*arrays, mask), atol=5e-6)


@pytest.mark.parametrize(
    ("name", "sizes", "length"),
    [
        ("causal_segments", (2, 1, 1, 2), 512),  # Queries are swapped.
        ("window", (1, 1, 2, 2), 256),
        ("full", (1, 1, 1, 2), 256),
    ],
)
def test_rows_cut_over_devices_equal_xla_in_value_and_gradient(name, sizes, length):
    ids = jnp.asarray(np.arange(length)[None].repeat(2, 0) // [[50], [150]])
    mask = {
        "causal_segments": AttentionMask(query_segment_ids=ids, key_segment_ids=ids),
        "window": AttentionMask(window=140),
        "full": AttentionMask(is_causal=False),
    }[name]
    mesh = Mesh(np.array(jax.devices()[: np.prod(sizes)]).reshape(sizes), MESH_AXES)
    keys, sharder = jax.random.split(jax.random.key(0), 4), Sharder(mesh)
    kv_heads = sizes[2]
    *arrays, pulled = [
        jax.random.normal(key, (2, length, heads, 8))
        for key, heads in zip(keys, (2, kv_heads, kv_heads, 2), strict=True)
    ]

    def splash(*arrays):
        return attention_splash(*arrays, mask, logit_softcap=5.0, sharder=sharder, interpret=True)

    def xla(*arrays):
        return attention_xla(*arrays, mask, terms=LogitTerms(5.0))

    results = []
    for attended in (splash, xla):
        output, pull = jax.vjp(attended, *arrays)
        results.append((output, *pull(pulled)))
    assert results[0][0].sharding.is_equivalent_to(
        sharder.sharding("batch", "length", "heads", None), 4
    )
    for ours, theirs in zip(*results, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize("name", ["causal", "full", "window_segments"])
def test_lowers_for_tpu(name):
    mask = masks(128)[name]

    def gradients(*arrays):
        def loss(*arrays):
            output = attend(*arrays, mask, platform="tpu", kernel="auto", logit_softcap=30.0)
            return output.astype(jnp.float32).sum()

        return jax.grad(loss, argnums=(0, 1, 2))(*arrays)

    traced = jax.jit(gradients).trace(*inputs(dtype=jnp.bfloat16))
    text = traced.lower(lowering_platforms=("tpu",)).as_text()
    assert text.count("tpu_custom_call") >= 3  # forward, dq, and dk with dv
    assert f"4x{T}x{S}x" not in text  # no logits outside the kernel
