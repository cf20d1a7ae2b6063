"""The average of weights; tests/training/transforms_grokfast_test.py has its common suite."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from megatransformer_jax.training.transforms import average_weights


def test_it_equals_the_formula():
    """With decay 0.3 both branches of the minimum are met."""
    optimizer = average_weights(optax.sgd(0.1), decay=0.3)
    params = {"w": jnp.array([1.0, -2.0])}
    state = optimizer.init(params)
    weights = average = np.array([1.0, -2.0])
    for t in range(1, 6):
        gradient = np.array([1.0, 0.5]) * t
        updates, state = optimizer.update({"w": jnp.asarray(gradient)}, state, params)
        params = optax.apply_updates(params, updates)
        weights = weights - 0.1 * gradient
        d = min(0.3, (1 + t) / (10 + t))
        average = average + (1 - d) * (weights - average)
        np.testing.assert_allclose(params["w"], weights, atol=1e-6)
        np.testing.assert_allclose(state.average["w"], average, atol=1e-6, err_msg=str(t))
    assert int(state.count) == 5


def test_the_updates_are_those_of_the_inner_optimizer():
    params = {"w": jnp.array([1.0, -2.0])}
    plain, averaged = optax.adam(0.1), average_weights(optax.adam(0.1), 0.9)
    expected, _ = plain.update(params, plain.init(params), params)
    updates, _ = averaged.update(params, averaged.init(params), params)
    jax.tree.map(np.testing.assert_array_equal, updates, expected)


def test_the_average_starts_in_a_buffer_of_its_own():
    params = {"w": jnp.ones(2)}
    state = average_weights(optax.sgd(0.1), 0.9).init(params)
    assert state.average["w"].unsafe_buffer_pointer() != params["w"].unsafe_buffer_pointer()


def test_it_says_what_it_lacks():
    optimizer = average_weights(optax.sgd(0.1), 0.9)
    params = {"w": jnp.ones(2)}
    with pytest.raises(ValueError, match="needs the parameters"):
        optimizer.update(params, optimizer.init(params))
