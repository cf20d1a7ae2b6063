"""Power iteration finds the largest eigenvalue of the dense Jacobian."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from megatransformer_jax.config.layers import AttentionConfig
from megatransformer_jax.config.model import MlpConfig, ModelConfig
from megatransformer_jax.config.recurrence import RecurrenceConfig
from megatransformer_jax.evaluation.recurrence import growth_rate, spectral_radius
from megatransformer_jax.models.megatransformer import build_model, init_params
from megatransformer_jax.models.passes.observed import open_core
from megatransformer_jax.sharding.rules import Sharder
from megatransformer_jax.types import Batch, DTypePolicy

ROWS, LENGTH, WIDTH, STEPS = 2, 3, 8, 2


def test_the_rate_is_the_spectral_radius_also_for_complex_eigenvalues():
    rng = np.random.default_rng(0)
    # A rotation in the largest plane: its eigenvalues are a complex pair.
    angle, radius = 0.7, 1.3
    blocks = np.diag(rng.uniform(0.1, 0.9, 6))
    blocks[:2, :2] = radius * np.array(
        [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    )
    basis = rng.normal(size=(6, 6))
    matrix = jnp.asarray(basis @ blocks @ np.linalg.inv(basis), jnp.float32)

    def product(vector):
        return (vector.reshape(1, -1) @ matrix.T).reshape(vector.shape)

    vector = jnp.asarray(rng.normal(size=(1, 2, 3)), jnp.float32)
    rate = growth_rate(product, vector, jnp.ones((1, 2), bool), 200)
    np.testing.assert_allclose(rate, [radius], rtol=0.02)
    zero = growth_rate(lambda v: 0 * v, vector, jnp.ones((1, 2), bool), 4)
    np.testing.assert_array_equal(zero, [0.0])


def test_each_iteration_equals_the_eigenvalues_of_its_dense_jacobian():
    config = ModelConfig(
        vocab_size=16,
        width=WIDTH,
        max_length=8,
        core_layers=1,
        attention=AttentionConfig(num_heads=2),
        mlp=MlpConfig(hidden_width=8),
        recurrence=RecurrenceConfig(state_init="normal"),
    )
    model = build_model(config, DTypePolicy(), Sharder(), "cpu")
    # Larger weights than at the start of a run, or the Jacobian is nearly W_s alone.
    params = jax.tree.map(lambda p: 2 * p, init_params(model, jax.random.key(0)))
    tokens = np.random.default_rng(1).integers(0, 16, (ROWS, LENGTH)).astype(np.int32)
    positions = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), tokens.shape)
    # The second row's last token is padding.
    segments = np.array([[1, 1, 1], [1, 1, 0]], np.int32)
    batch = Batch(tokens, tokens, np.ones(tokens.shape, np.float32), segments, positions)
    key = jax.random.key(2)
    found = spectral_radius(model, params, batch, STEPS, key, 400)

    device_batch = jax.tree.map(jnp.asarray, batch)
    core = open_core(
        model,
        params,
        device_batch.tokens,
        positions=device_batch.positions,
        segment_ids=device_batch.segment_ids,
    )
    jacobian = jax.jit(jax.jacobian(lambda state: core.iterate(state, 0)))
    state = core.first_state(jax.random.split(key)[0])
    for i in range(STEPS):
        dense = np.asarray(jacobian(state))
        radii = []
        for row in range(ROWS):
            count = int((segments[row] > 0).sum())
            block = dense[row, :count, :, row, :count].reshape(count * WIDTH, count * WIDTH)
            radii.append(np.abs(np.linalg.eigvals(block)).max())
        np.testing.assert_allclose(found[i], np.mean(radii), rtol=0.03)
        state = core.iterate(state, i)
    with pytest.raises(ValueError, match="power_iterations 1"):
        spectral_radius(model, params, batch, STEPS, key, 1)
