"""The core iterates; values and gradients equal a plain Python loop's."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct
from hypothesis import given, settings
from hypothesis import strategies as st

from megatransformer_jax.config.layers import AttentionConfig
from megatransformer_jax.config.model import MlpConfig, ModelConfig
from megatransformer_jax.config.recurrence import RecurrenceConfig
from megatransformer_jax.models import implicit
from megatransformer_jax.models.core import Pass, RecurrentCore, recur, recur_observed
from megatransformer_jax.models.megatransformer import build_model, init_params
from megatransformer_jax.nn.context import LayerContext
from megatransformer_jax.ops.masks import AttentionMask
from megatransformer_jax.sharding.rules import Sharder
from megatransformer_jax.types import DTypePolicy

ROWS, LENGTH, WIDTH = 3, 4, 5
MAX_STEPS = 9


@struct.dataclass
class Toy(Pass):
    """A pass whose core is one product.

    The iteration itself enters, so that a loop which counts wrongly gives another value.
    """

    def iterate(self, state, iteration, step=None):
        turn = iteration if step is None else step
        return iterate(self.params, state, self.prepared, turn)


@struct.dataclass
class Shifted(Pass):
    """The same in every iteration."""

    def iterate(self, state, iteration, step=None):
        return jnp.tanh(state @ self.params + self.prepared)


def iterate(params, state, prepared, step):
    return jnp.tanh(state @ params + prepared + 0.1 * step)


def toy(params, prepared, kind=Toy):
    return kind(None, params, prepared, prepared, LayerContext(AttentionMask(is_causal=True)))


def inputs(seed=0):
    keys = jax.random.split(jax.random.key(seed), 3)
    params = jax.random.normal(keys[0], (WIDTH, WIDTH)) / WIDTH**0.5
    prepared, state = (jax.random.normal(k, (ROWS, LENGTH, WIDTH)) for k in keys[1:])
    return params, prepared, state


def python_loop(params, prepared, state, num_steps, backprop_depth):
    """Row by row in Python. Truncation is a stop_gradient on what the early iterations see."""
    draws = np.broadcast_to(
        num_steps.reshape(num_steps.shape + (1,) * (2 - num_steps.ndim)), (ROWS, LENGTH)
    )
    total = int(draws.max())
    stopped = jax.lax.stop_gradient((params, prepared))
    if backprop_depth:
        state = jax.lax.stop_gradient(state)
    for step in range(total):
        has_gradient = not backprop_depth or step >= total - backprop_depth
        current_params, current_prepared = (params, prepared) if has_gradient else stopped
        new = iterate(current_params, state, current_prepared, step)
        if not has_gradient:
            new = jax.lax.stop_gradient(new)
        joined = step >= total - draws
        state = jnp.where(joined[..., None], new, state)
    return state


counts = st.integers(0, MAX_STEPS)
draws = st.one_of(
    counts.map(np.int32),
    st.lists(counts, min_size=ROWS, max_size=ROWS).map(lambda d: np.array(d, np.int32)),
    st.lists(counts, min_size=ROWS * LENGTH, max_size=ROWS * LENGTH).map(
        lambda d: np.array(d, np.int32).reshape(ROWS, LENGTH)
    ),
)


@functools.partial(jax.jit, static_argnames="backprop_depth")
def compiled_loss_and_gradients(params, prepared, state, num_steps, backprop_depth):
    def loss(params, prepared):
        out = recur(toy(params, prepared), state, num_steps, backprop_depth=backprop_depth)
        return jnp.sum(out**2), out

    return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(params, prepared)


@settings(max_examples=15, deadline=None)
@given(num_steps=draws, backprop_depth=st.sampled_from([1, 4]))
def test_value_and_gradients_equal_a_python_loop(num_steps, backprop_depth):
    params, prepared, state = inputs()
    num_steps = np.asarray(num_steps)
    (_, out), gradients = compiled_loss_and_gradients(
        params, prepared, state, jnp.asarray(num_steps), backprop_depth
    )

    def loss(params, prepared):
        return jnp.sum(python_loop(params, prepared, state, num_steps, backprop_depth) ** 2)

    expected = python_loop(params, prepared, state, num_steps, backprop_depth)
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(
        gradients, jax.grad(loss, argnums=(0, 1))(params, prepared), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("num_steps", [0, 1, 7])
def test_inference_loop_equals_a_python_loop(num_steps):
    params, prepared, state = inputs(1)
    out = recur(toy(params, prepared), state, jnp.int32(num_steps), backprop_depth=0)
    expected = python_loop(params, prepared, state, np.int32(num_steps), 0)
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-6)


def test_a_row_with_fewer_steps_equals_running_it_alone():
    params, prepared, state = inputs(2)

    core = toy(params, prepared, Shifted)
    together = recur(core, state, jnp.array([2, 5, 0]), backprop_depth=2)
    for row, count in enumerate([2, 5, 0]):
        here = slice(row, row + 1)
        core = toy(params, prepared[here], Shifted)
        alone = recur(core, state[here], jnp.int32(count), backprop_depth=2)
        np.testing.assert_allclose(together[row], alone[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("unroll", [1, 2, 3])
def test_unrolling_changes_nothing(unroll):
    params, prepared, state = inputs(3)
    options = {"backprop_depth": 3, "unroll": unroll}
    out = recur(toy(params, prepared), state, jnp.int32(5), **options)
    plain = recur(toy(params, prepared), state, jnp.int32(5), backprop_depth=3)
    np.testing.assert_allclose(out, plain, rtol=1e-6)


def test_the_state_before_the_last_iteration_can_be_seen():
    params, prepared, state = inputs(4)
    counts = np.array([[1, 2, 9, 3]] * ROWS, np.int32)

    def both(params):
        seen = []
        options = {"backprop_depth": 4, "kept_every": 2, "see_previous": seen.append}
        last = recur(toy(params, prepared), state, jnp.asarray(counts), **options)
        return seen[0], last

    def in_two_loops(params):
        return tuple(
            python_loop(params, prepared, state, counts - less, 4 - less) for less in (1, 0)
        )

    def differentiate(states):
        def moved(params):
            previous, last = states(params)
            return jnp.sum((last - previous) ** 2), (previous, last)

        return jax.value_and_grad(moved, has_aux=True)(params)

    found = jax.jit(lambda: differentiate(both))()
    jax.tree.map(
        lambda ours, theirs: np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5),
        found,
        differentiate(in_two_loops),
    )


@pytest.mark.parametrize("num_steps", [2, 7, [1, 7, 2], [[1, 2, 9, 3]] * ROWS])
def test_gradients_reach_the_first_state_of_rows_that_are_short_enough(num_steps):
    params, prepared, state = inputs(5)
    counts = jnp.asarray(num_steps)

    def loss(state):
        core = toy(params, prepared, Shifted)
        out = recur(core, state, counts, backprop_depth=2, trains_state=True)
        return jnp.sum(out**2)

    def alone(state, count):
        for _ in range(count):
            state = jnp.tanh(state @ params + prepared)
        return jnp.sum(state**2, axis=(2,))

    shape = counts.shape + (1,) * (2 - counts.ndim)
    of_each = np.broadcast_to(np.asarray(num_steps).reshape(shape), (ROWS, LENGTH))
    gradient = jax.grad(loss)(state)
    for count in np.unique(of_each):
        wanted = jax.grad(lambda state, count=count: alone(state, count).sum())(state)
        here = of_each == count
        np.testing.assert_allclose(
            gradient[here], wanted[here] if count <= 2 else 0, rtol=1e-5, atol=1e-6
        )


def test_observed_gradients_reach_the_first_state_if_all_iterations_have_them():
    params, prepared, state = inputs(6)

    def loss(state, depth):
        core = toy(params, prepared)
        options = {"num_steps": 3, "backprop_depth": depth, "trains_state": True}
        return jnp.sum(recur_observed(core, state, jnp.sum, **options))

    assert np.all(jax.grad(loss)(state, 2) == 0)
    assert np.all(jax.grad(loss)(state, 3) != 0)


def tiny_model(**recurrence):
    config = ModelConfig(
        vocab_size=32,
        width=16,
        max_length=16,
        prelude_layers=1,
        core_layers=1,
        coda_layers=1,
        attention=AttentionConfig(num_heads=2),
        mlp=MlpConfig(hidden_width=24),
        recurrence=RecurrenceConfig(**recurrence),
    )
    return build_model(config, DTypePolicy(), Sharder(), "cpu")


def depth_difference(model):
    """How far the logits move from one iteration to eight, and from seven to eight."""
    params = init_params(model, jax.random.key(0))
    tokens = jnp.arange(8, dtype=jnp.int32)[None]
    run = jax.jit(
        lambda n: (
            model.apply(
                {"params": params}, tokens, num_steps=n, rngs={"state": jax.random.key(1)}
            ).logits
        )
    )
    one, seven, eight = (run(jnp.int32(n)) for n in (1, 7, 8))
    return float(jnp.max(jnp.abs(eight - one))), float(jnp.max(jnp.abs(eight - seven)))


def check_core_iterates(model):
    from_one, from_seven = depth_difference(model)
    assert from_one > 1e-2
    assert from_seven > 1e-6


@pytest.mark.parametrize("adapter", ["linear", "sum", "gate", "diagonal", "none"])
def test_the_core_iterates(adapter):
    options = {"state_init": "normal"}
    if adapter == "none":
        options = {"state_init": "none", "backprop_depth": 8}
    check_core_iterates(tiny_model(adapter=adapter, **options))


def test_feeding_the_wrong_variable_is_noticed(monkeypatch):
    """MegaTransformer's bug: each iteration read the injected embedding, not the last state."""
    right = RecurrentCore.__call__

    def reads_the_injection(self, state, prepared, context):
        return right(self, prepared, prepared, context)

    monkeypatch.setattr(RecurrentCore, "__call__", reads_the_injection)
    with pytest.raises(AssertionError):
        check_core_iterates(tiny_model(state_init="normal"))


def test_dropout_differs_between_iterations_and_is_repeatable(monkeypatch):
    config = dataclasses.replace(tiny_model().config, residual_dropout_rate=0.5)
    model = build_model(config, DTypePolicy(), Sharder(), "cpu")
    params = init_params(model, jax.random.key(0))
    caught = []

    def catch(core, state, num_steps, **options):
        caught.append([core.iterate(state, jnp.int32(step)) for step in (0, 1, 1)])
        return state

    monkeypatch.setattr(implicit, "recur", catch)
    model.apply(
        {"params": params},
        jnp.zeros((1, 4), jnp.int32),
        num_steps=1,
        deterministic=False,
        rngs={"state": jax.random.key(1), "dropout": jax.random.key(2)},
    )
    first, second, again = caught[0]
    assert float(jnp.max(jnp.abs(first - second))) > 1e-3
    np.testing.assert_array_equal(second, again)


@pytest.mark.parametrize("backprop_depth", [2, 9])
def test_observed_iterations_are_those_of_a_python_loop(backprop_depth):
    params, prepared, state = inputs(4)
    count, factor = 5, jnp.float32(1.5)

    def ours(params, prepared, factor):
        return recur_observed(
            toy(params, prepared),
            state,
            lambda state: jnp.sum((factor * state) ** 2),
            num_steps=count,
            backprop_depth=backprop_depth,
        )

    def expected(params, prepared, factor):
        seen, now = [], state
        for step in range(count):
            given = (params, prepared)
            if step < count - backprop_depth:
                given = jax.lax.stop_gradient(given)
            now = iterate(given[0], now, given[1], step)
            seen.append(jnp.sum((factor * now) ** 2))
        return jnp.stack(seen)

    arguments = params, prepared, factor
    np.testing.assert_allclose(ours(*arguments), expected(*arguments), rtol=1e-5)
    # Weights that differ: the gradient of each iteration is seen, early ones by `observe` alone.
    weights = 1.0 + jnp.arange(count)
    gradients, wanted = (
        jax.grad(lambda *arguments, f=f: f(*arguments) @ weights, argnums=(0, 1, 2))(*arguments)
        for f in (ours, expected)
    )
    for a, b in zip(gradients, wanted, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
