"""cuDNN attention without a GPU: the program that is made, and the mask that is passed."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_reference import attend
from jax._src.cudnn import fused_attention_stablehlo

from megatransformer_jax.ops.attention import attention_cudnn
from megatransformer_jax.ops.attention_xla import attention_xla
from megatransformer_jax.ops.masks import AttentionMask

T, H = 32, 16
SEGMENTS = jnp.asarray(np.arange(T)[None].repeat(2, 0) // [[9], [13]], jnp.int32)
MASKS = {
    "causal": (AttentionMask(), T),
    "full": (AttentionMask(is_causal=False), T),
    "window": (AttentionMask(window=5), T),
    "acausal_window": (AttentionMask(is_causal=False, window=5), T),
    "segments": (AttentionMask(query_segment_ids=SEGMENTS, key_segment_ids=SEGMENTS), T),
    "cache": (AttentionMask(query_offset=jnp.int32(6), window=9), T + 12),
}
NEEDS_DENSE = {"acausal_window", "segments", "cache"}


def inputs(key_length, dtype):
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = ((2, T, 4, H), (2, key_length, 2, H), (2, key_length, 2, H))
    return [jax.random.normal(k, s, dtype) for k, s in zip(keys, shapes, strict=True)]


@pytest.mark.parametrize("name", MASKS)
def test_lowers_to_the_fused_calls_for_cuda(name, monkeypatch):
    version = types.SimpleNamespace(cudnn_get_version=lambda: 91200)
    monkeypatch.setattr(fused_attention_stablehlo, "cuda_versions", version)
    mask, key_length = MASKS[name]

    def gradients(query, key, value):
        def loss(*arrays):
            return attend(*arrays, mask, platform="gpu", kernel="auto").sum().astype(float)

        return jax.grad(loss, argnums=(0, 1, 2))(query, key, value)

    traced = jax.jit(gradients).trace(*inputs(key_length, jnp.bfloat16))
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    call = "__cudnn$fmhaScaleBiasSoftmax" if name in NEEDS_DENSE else "__cudnn$fmhaSoftmax"
    assert f"@{call}(" in text
    assert f"@{call}Backward(" in text
    assert "dot_general" not in text


@pytest.mark.parametrize("name", MASKS)
def test_passes_the_same_mask_as_xla(name, monkeypatch):
    """JAX's own XLA version takes cuDNN's arguments, so it stands in for the GPU."""
    stand_in = jax.nn.dot_product_attention
    monkeypatch.setattr(
        jax.nn,
        "dot_product_attention",
        lambda *args, implementation, **options: stand_in(*args, implementation="xla", **options),
    )
    mask, key_length = MASKS[name]
    arrays = inputs(key_length, jnp.float32)
    output = attention_cudnn(*arrays, mask, needs_dense_mask=name in NEEDS_DENSE)
    np.testing.assert_allclose(output, attention_xla(*arrays, mask), atol=2e-6)
    if name == "segments":
        assert np.all(np.asarray(output)[np.asarray(SEGMENTS) == 0] == 0.0)
