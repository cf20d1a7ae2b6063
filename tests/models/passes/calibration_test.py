"""Second moments of what matrices multiply, against a loop in Python."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from megatransformer_jax.config.layers import AttentionConfig
from megatransformer_jax.config.model import MlpConfig, ModelConfig
from megatransformer_jax.config.quantization import QuantizationConfig
from megatransformer_jax.config.recurrence import RecurrenceConfig
from megatransformer_jax.models.core import draw_num_steps
from megatransformer_jax.models.megatransformer import (
    build_model,
    init_params,
    param_axes,
    pass_context,
)
from megatransformer_jax.models.passes.calibration import add_moments, input_moments
from megatransformer_jax.models.passes.observed import open_core
from megatransformer_jax.models.quantization import quantized_paths
from megatransformer_jax.nn.quantized import PRODUCT_INPUTS
from megatransformer_jax.sharding.rules import Sharder
from megatransformer_jax.types import Batch, DTypePolicy

CONFIG = ModelConfig(
    vocab_size=24,
    width=8,
    max_length=6,
    core_layers=1,
    attention=AttentionConfig(num_heads=2),
    mlp=MlpConfig(hidden_width=12),
    recurrence=RecurrenceConfig(
        state_init="zero",
        mean_steps=3,
        max_steps=5,
        backprop_depth=1,
        sampling="uniform",
        draw_per="sequence",
    ),
)
KEY = jax.random.key(3)
ADAPTER = "core/adapter/state_kernel"


@pytest.fixture(scope="module")
def model():
    return build_model(CONFIG, DTypePolicy(), Sharder(), "cpu")


@pytest.fixture(scope="module")
def params(model):
    return init_params(model, jax.random.key(0))


@pytest.fixture(scope="module")
def batch():
    """The second row ends in padding."""
    tokens = np.arange(18, dtype=np.int32).reshape(3, 6)
    segments = np.ones_like(tokens)
    segments[1, 4:] = 0
    positions = np.broadcast_to(np.arange(6, dtype=np.int32), tokens.shape)
    arrays = tokens, tokens, segments.astype(np.float32), segments, positions
    return Batch(*map(jnp.asarray, arrays))


def test_every_iteration_counts_as_often_as_training_makes_it(model, params, batch):
    recurrence = CONFIG.recurrence
    depth_key, _ = jax.random.split(KEY)
    steps = np.asarray(draw_num_steps(recurrence, depth_key, 0, 3, 6))
    assert len(set(steps.tolist())) > 1, "the rows' depths should differ"
    found = input_moments(model, params, batch, KEY, (ADAPTER, "coda/layer_0/mlp/down"))

    core = open_core(
        model, params, batch.tokens, positions=batch.positions, segment_ids=batch.segment_ids
    )
    state, states = jnp.zeros_like(core.injected), []
    for iteration in range(recurrence.max_steps):
        states.append(np.asarray(state))
        state = core.iterate(state, iteration)
    # The adapter multiplies the state itself. A row begins from the first state whenever it joins.
    is_token = np.asarray(batch.segment_ids) > 0
    seen = [states[i][row][is_token[row]] for row in range(3) for i in range(steps[row])]
    x = np.concatenate(seen)
    np.testing.assert_allclose(found[ADAPTER].second, x.T @ x, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(found[ADAPTER].absolute, np.abs(x).sum(axis=0), rtol=1e-4)
    assert float(found[ADAPTER].count) == len(x)
    assert float(found["coda/layer_0/mlp/down"].count) == is_token.sum()


def test_what_layers_tell_is_what_they_multiply(model, params, batch):
    """x of the feed-forward's `down`, times its matrix, is its update."""
    variables = {"params": params}

    def run(module):
        x = module.embedding(batch.tokens, batch.positions, True)
        return module.prelude(x, pass_context(CONFIG, batch.positions, None, 8))

    _, sown = model.apply(variables, method=run, mutable=[PRODUCT_INPUTS, "residual_updates"])
    layer = sown[PRODUCT_INPUTS]["prelude"]["layer_0"]
    weights = params["prelude"]["layer_0"]
    update = sown["residual_updates"]["prelude"]["layer_0"]
    for part, name, made in (("mlp", "down", "mlp_update"), ("attention", "output", None)):
        (x,) = layer[part][name]
        kernel = np.asarray(weights[part][name])
        product = np.asarray(x) @ kernel.reshape(-1, kernel.shape[-1])
        expected = update[made or "attention_update"][0]
        np.testing.assert_allclose(product, expected, rtol=1e-4, atol=1e-5)


def test_layers_that_share_a_matrix_add_up(model, params, batch):
    """And batches do."""
    sharing = dataclasses.replace(CONFIG.sharing, scheme="cycle", core_unique=1)
    config = dataclasses.replace(CONFIG, core_layers=2, sharing=sharing)
    shared = build_model(config, DTypePolicy(), Sharder(), "cpu")
    paths = quantized_paths(param_axes(shared), QuantizationConfig())
    once = input_moments(model, params, batch, KEY, paths)
    twice = input_moments(shared, params, batch, KEY, paths)
    name = "core/layers/layer_0/mlp/up"
    assert float(twice[name].count) == 2 * float(once[name].count)
    total = add_moments(add_moments(None, once), once)
    np.testing.assert_allclose(total[name].second, 2 * once[name].second)


def test_a_matrix_that_no_layer_tells_of_is_an_error(model, params, batch):
    with pytest.raises(ValueError, match="no layer says what it multiplies core/absent by"):
        input_moments(model, params, batch, KEY, ("core/absent",))
