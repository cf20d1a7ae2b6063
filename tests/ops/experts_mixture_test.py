"""Mixtures against NumPy, and both gradients against each other and finite differences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from megatransformer_jax.ops.experts import mix_experts, mix_experts_for_training

NUM_EXPERTS, WIDTH, ACTIVE, LENGTH = 9, 4, 3, 5
RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.normal(size=(2, LENGTH, WIDTH)), jnp.float32)
GATES = jnp.asarray(RNG.uniform(size=(2, LENGTH, ACTIVE)), jnp.float32)
CHOSEN = jnp.asarray(RNG.integers(0, NUM_EXPERTS, (2, LENGTH, ACTIVE)), jnp.int32)
TABLES = jnp.asarray(RNG.normal(size=(2, NUM_EXPERTS, WIDTH)), jnp.float32)


@pytest.mark.parametrize("mix", [mix_experts, mix_experts_for_training])
@pytest.mark.parametrize("blocks", [1, 2])
def test_equals_numpy(mix, blocks):
    ours = mix(X, GATES, CHOSEN, *TABLES, jnp.tanh, blocks)
    hidden = np.tanh(np.einsum("btd,nd->btn", X, TABLES[0]))
    weight = np.zeros((2, LENGTH, NUM_EXPERTS))
    for b, t, e in np.ndindex(CHOSEN.shape):
        weight[b, t, CHOSEN[b, t, e]] += GATES[b, t, e]
    np.testing.assert_allclose(ours, (weight * hidden) @ TABLES[1], rtol=1e-5, atol=1e-5)


def test_gradients_in_blocks_are_those_of_plain_differentiation():
    cotangent = jnp.cos(jnp.arange(X.size)).reshape(X.shape)

    def gradients(mix, blocks):
        def loss(x, gates, table_in, table_out):
            mixed = mix(x, gates, CHOSEN, table_in, table_out, jnp.tanh, blocks)
            return jnp.sum(cotangent * mixed)

        return jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3)))(X, GATES, *TABLES)

    for ours, wanted in zip(
        gradients(mix_experts_for_training, 2), gradients(mix_experts, 1), strict=True
    ):
        np.testing.assert_allclose(ours, wanted, rtol=1e-5, atol=1e-5)


def test_can_be_differentiated_twice_in_reverse_and_forward_where_it_is_not_for_training():
    @jax.jit
    def slope(x):
        return jax.grad(
            lambda x: jnp.sum(
                jnp.sin(mix_experts_for_training(x, GATES, CHOSEN, *TABLES, jnp.tanh, 2))
            )
        )(x)

    check_grads(slope, (X,), order=1, modes=["rev"], rtol=2e-2, atol=2e-2)
    _, tangent = jax.jvp(
        lambda x: mix_experts(x, GATES, CHOSEN, *TABLES, jnp.tanh, 2), (X,), (jnp.ones_like(X),)
    )
    assert np.all(np.isfinite(tangent)) and np.abs(tangent).max() > 0
