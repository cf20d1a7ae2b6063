"""Adapters against their formulas; stability and exactness of the diagonal one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from hypothesis import given, settings
from hypothesis import strategies as st

from megatransformer_jax.config.model import ModelConfig
from megatransformer_jax.config.recurrence import RecurrenceConfig
from megatransformer_jax.nn.adapters import INITIAL_DECAY, build_adapter
from megatransformer_jax.nn.parameters import weight_init
from megatransformer_jax.types import DTypePolicy

WIDTH = 8


def make(adapter, zero_order_hold=False, **options):
    recurrence = RecurrenceConfig(adapter=adapter, zero_order_hold=zero_order_hold, **options)
    config = ModelConfig(width=WIDTH, recurrence=recurrence)
    return build_adapter(config, weight_init(config, WIDTH), DTypePolicy())


def both(module, state, embedding):
    return module(state, module.prepare(embedding))


def run(adapter, params, state, embedding, **options):
    module = make(adapter, **options)
    return np.asarray(module.apply({"params": params}, state, embedding, method=both))


@pytest.fixture
def arrays():
    state, embedding = jax.random.normal(jax.random.key(0), (2, 2, 3, WIDTH))
    return state, embedding


def fresh(adapter, arrays, **options):
    module = make(adapter, **options)
    variables = module.init(jax.random.key(1), *arrays, method=both)
    return nn.meta.unbox(variables).get("params", {})


def test_linear_equals_one_matrix_on_the_concatenation(arrays):
    params = fresh("linear", arrays)
    whole = np.concatenate([params["state_kernel"], params["embedding_kernel"]])
    wanted = np.concatenate(arrays, axis=-1).astype(np.float64) @ whole
    np.testing.assert_allclose(run("linear", params, *arrays), wanted, rtol=1e-5, atol=1e-6)


def test_sum_and_gate(arrays):
    state, embedding = arrays
    np.testing.assert_array_equal(run("sum", {}, *arrays), state + embedding)
    np.testing.assert_array_equal(run("gate", {}, *arrays), state * embedding)


def test_none_hands_the_state_on(arrays):
    np.testing.assert_array_equal(
        run("none", {}, *arrays, state_init="none", backprop_depth=8), arrays[0]
    )


def diagonal_params(seed=0):
    rng = np.random.default_rng(seed)
    values = {"a_log": rng.normal(size=WIDTH), "dt_bias": rng.normal(size=WIDTH)}
    values["b_matrix"] = rng.normal(size=(WIDTH, WIDTH))
    return {name: jnp.asarray(value, jnp.float32) for name, value in values.items()}


def decay_and_dt(params):
    dt = np.log1p(np.exp(np.asarray(params["dt_bias"], np.float64)))
    rate = np.exp(np.asarray(params["a_log"], np.float64))
    return np.exp(-dt * rate), dt, rate


@pytest.mark.parametrize("zero_order_hold", [False, True])
def test_diagonal_equals_its_formula(arrays, zero_order_hold):
    state, embedding = (np.asarray(array, np.float64) for array in arrays)
    params = diagonal_params()
    decay, dt, rate = decay_and_dt(params)
    gain = (1 - decay) / rate if zero_order_hold else dt
    wanted = decay * state + gain * (embedding @ np.asarray(params["b_matrix"]))
    out = run("diagonal", params, *arrays, zero_order_hold=zero_order_hold)
    np.testing.assert_allclose(out, wanted, rtol=1e-5, atol=1e-5)


def test_zero_order_hold_solves_the_differential_equation(arrays):
    """Holding the input, many small exact steps of s' = -A s + B e end where one large one does."""
    state, embedding = (np.asarray(array, np.float64) for array in arrays)
    params = diagonal_params(1)
    _, dt, rate = decay_and_dt(params)
    write, small = embedding @ np.asarray(params["b_matrix"], np.float64), 20_000
    for _ in range(small):
        state = state + dt / small * (-rate * state + write)
    out = run("diagonal", params, *arrays, zero_order_hold=True)
    np.testing.assert_allclose(out, state, rtol=1e-3, atol=1e-3)


def test_diagonal_starts_at_the_stated_decay_and_identity(arrays):
    params = fresh("diagonal", arrays)
    decay, _, _ = decay_and_dt(params)
    np.testing.assert_allclose(decay, INITIAL_DECAY, rtol=1e-6)
    np.testing.assert_array_equal(params["b_matrix"], np.eye(WIDTH))


@settings(deadline=None, max_examples=30)
@given(a_log=st.floats(-10, 10), dt_bias=st.floats(-10, 30))
def test_diagonal_never_grows_whatever_its_parameters(a_log, dt_bias):
    """Without input the state may not grow: stability does not depend on training."""
    params = {
        "a_log": jnp.full(WIDTH, a_log, jnp.float32),
        "dt_bias": jnp.full(WIDTH, dt_bias, jnp.float32),
        "b_matrix": jnp.eye(WIDTH),
    }
    state = jnp.ones((1, 1, WIDTH))
    out = run("diagonal", params, state, jnp.zeros_like(state))
    assert np.all(out >= 0)
    assert np.all(out <= 1)
