"""Hutchinson's estimate of the core's Jacobian, against the dense one; value and gradient."""

import jax
import jax.numpy as jnp
import numpy as np
from scipy.linalg import hadamard

from megatransformer_jax.config.layers import AttentionConfig
from megatransformer_jax.config.model import MlpConfig, ModelConfig
from megatransformer_jax.config.recurrence import RecurrenceConfig
from megatransformer_jax.models.megatransformer import build_model, init_params, layer_context
from megatransformer_jax.models.passes.observed import open_core, random_signs, squared_jacobian
from megatransformer_jax.ops.masks import AttentionMask
from megatransformer_jax.sharding.rules import Sharder
from megatransformer_jax.types import DTypePolicy

LENGTH, WIDTH = 2, 8
SIZE = LENGTH * WIDTH
CONFIG = ModelConfig(
    vocab_size=16,
    width=WIDTH,
    max_length=8,
    core_layers=1,
    remat="full",
    attention=AttentionConfig(num_heads=2),
    mlp=MlpConfig(hidden_width=8),
    recurrence=RecurrenceConfig(state_init="normal"),
)
POSITIONS = jnp.arange(LENGTH)[None]
TOKENS = jnp.array([[3, 7]], jnp.int32)


def dense_jacobian(model, params, state):
    """[SIZE, SIZE] of one iteration, from the model's parts; what is injected is a constant."""
    context = layer_context(CONFIG, POSITIONS, AttentionMask(is_causal=True), WIDTH)
    variables = {"params": params}
    x = model.apply(variables, TOKENS, POSITIONS, context, method="run_prelude")
    injected = model.apply(variables, x, context, method="enter_core").injected
    core = {"params": params["core"]}
    injected = jax.lax.stop_gradient(injected)
    prepared = model.core_module().apply(core, injected, method="prepare")

    def step(flat):
        return model.core_module().apply(core, flat.reshape(state.shape), prepared, context).ravel()

    return jax.jacobian(step)(state.ravel())


def test_the_mean_is_the_squared_norm_and_gradients_are_exact():
    model = build_model(CONFIG, DTypePolicy(), Sharder(), "cpu")
    params = jax.tree.map(lambda p: 2 * p, init_params(model, jax.random.key(0)))
    state = jax.random.normal(jax.random.key(1), (1, LENGTH, WIDTH))

    def ours(params, probe):
        probe = probe.reshape(state.shape)
        core = open_core(model, params, TOKENS, positions=POSITIONS, segment_ids=None)
        return squared_jacobian(core, state, probe, jnp.int32(0))

    def dense(params, probe):
        jacobian = dense_jacobian(model, params, state)
        return jnp.sum(jnp.square(jacobian.T @ probe)), jacobian

    # Orthogonal signs: the mean over all of them is exact, not a sample.
    signs = jnp.asarray(hadamard(SIZE), jnp.float32)
    each = jax.jit(jax.vmap(jax.value_and_grad(ours), in_axes=(None, 0)))
    values, all_gradients = each(params, signs)
    (wanted, jacobian), wanted_gradients = jax.jit(jax.value_and_grad(dense, has_aux=True))(
        params, signs[5]
    )
    np.testing.assert_allclose(jnp.mean(values), jnp.sum(jacobian**2), rtol=1e-4)
    np.testing.assert_allclose(values[5], wanted, rtol=1e-4)
    gradients = jax.tree.map(lambda leaf: leaf[5], all_gradients)
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(gradients),
        jax.tree.leaves(wanted_gradients),
        strict=True,
    ):
        name = jax.tree_util.keystr(path)
        np.testing.assert_allclose(a, b, rtol=2e-3, atol=1e-4, err_msg=name)
        # Only the core is trained by it; the other's own gradient is exactly none.
        assert np.any(np.asarray(a) != 0) == ("'core'" in name), name


def test_signs_stand_where_tokens_count():
    mask = jnp.array([[1.0, 0.0], [1.0, 1.0]])
    signs = np.asarray(random_signs(jax.random.key(0), mask, 64))
    np.testing.assert_array_equal(np.abs(signs), np.asarray(mask)[..., None] * np.ones(64))
    assert abs(signs.sum()) < 60  # Both signs; 192 of one would be the sum of a constant.
