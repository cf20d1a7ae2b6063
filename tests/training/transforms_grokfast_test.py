"""Gradient filters and the average of weights pass one suite, as optax's transformations do."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from megatransformer_jax.training.optimizers import add_decayed_weights, scale_by_learning_rate
from megatransformer_jax.training.transforms import average_weights, grokfast_ema, grokfast_ma


def everywhere(value):
    return lambda params: jax.tree.map(lambda _: value, params)


# The factory with its arguments, and which of them optax.inject_hyperparams must leave alone.
TRANSFORMS = {
    "grokfast_ema": (functools.partial(grokfast_ema, alpha=0.9, lamb=2.0), ()),
    "grokfast_ma": (functools.partial(grokfast_ma, window=3, lamb=2.0), ("window", "warmup")),
    "average_weights": (
        functools.partial(average_weights, inner=optax.sgd(0.1), decay=0.9),
        ("inner",),
    ),
    "add_decayed_weights": (
        functools.partial(add_decayed_weights, rates=everywhere(0.1)),
        ("rates", "is_cautious"),
    ),
    "fading_decayed_weights": (
        functools.partial(
            add_decayed_weights, rates=everywhere(0.1), fades_over=6, is_cautious=True
        ),
        ("rates", "fades_over", "is_cautious"),
    ),
    "scale_by_learning_rate": (
        functools.partial(
            scale_by_learning_rate,
            schedule=optax.constant_schedule(0.1),
            factors=everywhere(2.0),
            check=lambda params: None,
        ),
        ("schedule", "factors", "check"),
    ),
}
STEPS = 4


@pytest.fixture(params=TRANSFORMS)
def name(request):
    return request.param


def example_params(dtype=jnp.float32):
    return {"a": jnp.array([[1.0, -2.0], [0.5, 3.0]], dtype), "b": {"c": jnp.ones(3, dtype)}}


def gradients_of(params, step):
    return jax.tree.map(lambda p: jnp.asarray(jnp.cos(step + p), p.dtype), params)


def run(transform, params, update=None):
    """All updates and the last state; the structure of the state must stay as it was."""
    update = transform.update if update is None else update
    state, history = transform.init(params), []
    structure = jax.tree.map(lambda x: (jnp.shape(x), jnp.asarray(x).dtype), state)
    for step in range(STEPS):
        updates, state = update(gradients_of(params, step), state, params)
        history.append(updates)
        assert jax.tree.map(lambda x: (jnp.shape(x), jnp.asarray(x).dtype), state) == structure
    return history, state


def assert_close(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), left, right)


def test_compiled_equals_eager(name):
    transform = TRANSFORMS[name][0]()
    params = example_params()
    assert_close(run(transform, params, jax.jit(transform.update)), run(transform, params))


def test_updates_and_state_keep_their_type(name):
    transform = TRANSFORMS[name][0]()
    params = example_params(jnp.bfloat16)
    history, state = run(transform, params)
    assert {leaf.dtype for leaf in jax.tree.leaves(history)} == {jnp.dtype(jnp.bfloat16)}
    assert all(leaf.dtype in (jnp.bfloat16, jnp.int32) for leaf in jax.tree.leaves(state))


def test_in_a_chain_it_acts_where_it_stands(name):
    transform = TRANSFORMS[name][0]()
    params = example_params()
    plain, _ = run(transform, params)
    chained, _ = run(optax.chain(optax.identity(), transform, optax.scale(-0.5)), params)
    assert_close(chained, jax.tree.map(lambda u: -0.5 * u, plain))


def test_masked_and_partitioned_it_acts_on_its_part(name):
    transform = TRANSFORMS[name][0]()
    params = example_params()
    plain, _ = run(transform, params)
    raw = [gradients_of(params, step) for step in range(STEPS)]
    expected = [{"a": u["a"], "b": g["b"]} for u, g in zip(plain, raw, strict=True)]
    masked = optax.masked(transform, {"a": True, "b": {"c": False}})
    labels = {"a": "filtered", "b": {"c": "raw"}}
    parted = optax.partition({"filtered": transform, "raw": optax.identity()}, labels)
    assert_close(run(masked, params)[0], expected)
    assert_close(run(parted, params)[0], expected)


def test_numbers_can_be_injected(name):
    factory, static = TRANSFORMS[name]
    params = example_params()
    injected = optax.inject_hyperparams(factory.func, static_args=static)(**factory.keywords)
    assert_close(run(injected, params)[0], run(factory(), params)[0])


def test_ema_equals_the_formula():
    params = example_params()
    h = np.zeros((2, 2))
    for step, updates in enumerate(run(grokfast_ema(0.9, 2.0), params)[0]):
        g = np.asarray(gradients_of(params, step)["a"])
        h = 0.9 * h + (1 - 0.9) * g
        np.testing.assert_allclose(updates["a"], g + 2.0 * h, rtol=1e-5, err_msg=str(step))


@pytest.mark.parametrize("warmup", [True, False])
def test_ma_equals_the_formula(warmup):
    params = example_params()
    seen = []
    for step, updates in enumerate(run(grokfast_ma(3, 2.0, warmup), params)[0]):
        g = np.asarray(gradients_of(params, step)["a"])
        seen.append(g)
        slow = np.mean(seen[-3:], axis=0) if step >= 2 or not warmup else 0.0
        np.testing.assert_allclose(updates["a"], g + 2.0 * slow, rtol=1e-5, err_msg=str(step))


def test_an_empty_window_is_refused():
    with pytest.raises(ValueError, match="window=0: the mean needs at least 1 gradient"):
        grokfast_ma(window=0)
