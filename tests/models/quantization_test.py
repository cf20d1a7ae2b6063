"""Rounding matrices: against NumPy and qwix, what GPTQ and AWQ gain, and models that read them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from qwix._src.core import qarray
from qwix.contrib import gptq_core

from megatransformer_jax.config.layers import AttentionConfig
from megatransformer_jax.config.model import MlpConfig, ModelConfig
from megatransformer_jax.config.option import ConfigError, UserError
from megatransformer_jax.config.quantization import QuantizationConfig
from megatransformer_jax.config.recurrence import RecurrenceConfig
from megatransformer_jax.models.megatransformer import build_model, init_params, param_axes
from megatransformer_jax.models.passes.calibration import Moments
from megatransformer_jax.models.quantization import (
    dequantize_weights,
    is_quantized_model,
    quantize_matrix,
    quantize_weights,
    quantized_paths,
    round_by_gptq,
    round_to_nearest,
)
from megatransformer_jax.nn.quantized import is_quantized_matrix
from megatransformer_jax.sharding.rules import Sharder
from megatransformer_jax.types import DTypePolicy

CONFIG = ModelConfig(
    vocab_size=24,
    width=16,
    max_length=8,
    prelude_layers=1,
    core_layers=2,
    coda_layers=1,
    attention=AttentionConfig(num_heads=4, num_kv_heads=2),
    mlp=MlpConfig(hidden_width=24),
    recurrence=RecurrenceConfig(state_init="zero"),
)
TOKENS = jnp.arange(16, dtype=jnp.int32).reshape(2, 8)
EVERYTHING = (r"/attention/(qkv|output)$", r"/mlp/(up|down)$", "^core/adapter", "^embedding/")


@pytest.fixture(scope="module")
def model():
    return build_model(CONFIG, DTypePolicy(), Sharder(), "cpu")


@pytest.fixture(scope="module")
def params(model):
    return init_params(model, jax.random.key(0))


def moments_of(x):
    second, absolute = jnp.asarray(x.T @ x), jnp.asarray(np.abs(x).sum(axis=0))
    return Moments(second, absolute, jnp.float32(len(x)))


def draw(shape, seed=1):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize(("bits", "group"), [(8, 10), (4, 4)])
def test_rounding_to_nearest(bits, group):
    """The largest of a group lies half a step beyond the largest number, as qwix has it."""
    weight = draw((10, 3))
    numbers, scale = round_to_nearest(jnp.asarray(weight), bits, group)
    for start in range(0, 10, group):
        part = weight[start : start + group]
        expected = np.abs(part).max(axis=0) / (2 ** (bits - 1) - 0.5)
        np.testing.assert_allclose(scale[start // group], expected, rtol=1e-6)
        error = np.asarray(numbers)[start : start + group] - part / expected
        assert np.abs(error).max() < 0.5001


@pytest.mark.parametrize("group", [4, 8])
def test_gptq_is_that_of_qwix(group):
    """With the same blocks; 8 is the whole matrix."""
    weight, x = draw((8, 3)), draw((50, 8), 2)
    second = x.T @ x
    how = qarray.HowToQuantize(qtype=jnp.int4, channelwise_axes=(0,), tiled_axes={1: group})
    theirs, _ = gptq_core.quantize_weight(
        jnp.asarray(weight.T), jnp.asarray(second), how, blocksize=group
    )
    numbers, scale = round_by_gptq(jnp.asarray(weight), jnp.asarray(second), 4, group)
    np.testing.assert_array_equal(numbers, theirs.qvalue.T.astype(jnp.int8))
    np.testing.assert_allclose(scale, theirs.scale.T, rtol=1e-5)


def test_gptq_leaves_inputs_that_never_occur_alone():
    weight, x = draw((10, 3)), draw((50, 10), 2)
    x[:, 4] = 0
    numbers, _ = round_by_gptq(jnp.asarray(weight), jnp.asarray(x.T @ x), 8, 10)
    assert np.all(np.asarray(numbers)[4] == 0)
    assert np.all(np.isfinite(np.asarray(numbers)))


@pytest.mark.parametrize(
    ("method", "mix", "sizes"),
    [
        ("gptq", draw((12, 12), 3), np.ones(12)),
        ("awq", np.eye(12), np.where(np.arange(12) == 5, 30, 1)),
    ],
)
def test_methods_that_know_the_inputs_change_the_outputs_less(method, mix, sizes):
    """GPTQ gains from inputs that go together, AWQ from inputs that are larger than others."""
    x = (draw((400, 12), 2) @ mix * sizes).astype(np.float32)
    weight, moments, error = draw((12, 16)), moments_of(x), {}
    for name in ("rtn", method):
        config = QuantizationConfig(weights="int4", method=name, group=12)
        matrix = quantize_matrix(jnp.asarray(weight), 1, config, moments)
        found = np.asarray(matrix.times(jnp.asarray(x)))
        np.testing.assert_allclose(found, x @ np.asarray(matrix.dequantize()), atol=2e-3)
        error[name] = np.linalg.norm(found - x @ weight)
    assert error[method] < 0.85 * error["rtn"]
    with pytest.raises(ValueError, match=f"method='{method}' needs the moments"):
        quantize_matrix(jnp.asarray(weight), 1, config)


def test_layers_are_included_and_nothing_else_unless_asked(model):
    axes = param_axes(model)
    layers = quantized_paths(axes, QuantizationConfig())
    assert len(layers) == 16
    assert {path.partition("/")[0] for path in layers} == {"prelude", "core", "coda"}
    assert not any("adapter" in path or "norm" in path for path in layers)
    everything = quantized_paths(axes, QuantizationConfig(include=EVERYTHING))
    assert set(everything) - set(layers) == {
        "core/adapter/embedding_kernel",
        "core/adapter/state_kernel",
        "embedding/embedding",
    }
    core = quantized_paths(axes, QuantizationConfig(include=("^core/layers/layer_1",)))
    assert len(core) == 4


@pytest.mark.parametrize(
    ("pattern", "problem"),
    [
        ("mlp/absent", r"'mlp/absent' matches nothing; those that can be are coda/layer_0/"),
        ("final_norm", r"matches no matrix that can be quantised, only final_norm/scale; those"),
    ],
)
def test_patterns_that_fit_no_matrix_are_refused(model, pattern, problem):
    with pytest.raises(ConfigError, match=rf"include: .*{problem}"):
        quantized_paths(param_axes(model), QuantizationConfig(include=(pattern,)))


@pytest.mark.parametrize(
    ("weights", "scan_layers"), [("int8", False), ("int4", False), ("int4", True)]
)
def test_a_model_reads_what_its_matrices_mean(model, params, weights, scan_layers):
    """Every kind of matrix, in layers one by one and in layers that are scanned."""
    config = QuantizationConfig(weights=weights, group=8, include=EVERYTHING)
    quantized = quantize_weights(model, params, config)
    assert is_quantized_model(quantized)
    assert not is_quantized_model(params)
    meant = dequantize_weights(quantized)
    reading = model.copy(config=dataclasses.replace(CONFIG, scan_layers=scan_layers))
    found, exact = (
        jax.jit(lambda p: reading.apply({"params": p}, TOKENS, num_steps=3).logits)(each)
        for each in (quantized, meant)
    )
    np.testing.assert_allclose(found, exact, rtol=0, atol=2e-4)
    original = model.apply({"params": params}, TOKENS, num_steps=3).logits
    assert float(jnp.max(jnp.abs(found - original))) > 1e-3
    with pytest.raises(ValueError, match="is quantised already"):
        quantize_weights(model, quantized, config)


def test_activations_are_rounded_where_asked(model, params):
    exact, rounded = (
        quantize_weights(model, params, QuantizationConfig(activations=activations))
        for activations in ("float", "int8")
    )
    logits = [
        model.apply({"params": each}, TOKENS, num_steps=2).logits for each in (exact, rounded)
    ]
    difference = np.abs(np.asarray(logits[1] - logits[0])).max()
    assert 1e-4 < difference < 0.1 * np.abs(np.asarray(logits[0])).max()
    nodes = jax.tree.leaves(rounded, is_leaf=is_quantized_matrix)
    assert all(node.rounds_inputs for node in nodes if is_quantized_matrix(node))


def test_qwix_is_an_extra(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "qwix", None)
    with pytest.raises(UserError, match=r"quantising weights: qwix.*\[quantization\]"):
        round_to_nearest(jnp.ones((3, 5)), 8, 4)
