"""The implicit gradient against backpropagation through all iterations and a dense linear solve."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct

from megatransformer_jax.config.data import DataConfig
from megatransformer_jax.config.layers import AttentionConfig, ValueEmbeddingConfig
from megatransformer_jax.config.loop import TrainConfig
from megatransformer_jax.config.model import MlpConfig, ModelConfig
from megatransformer_jax.config.option import ConfigError
from megatransformer_jax.config.recurrence import (
    RecurrenceConfig,
    StabilityConfig,
    SupervisionConfig,
)
from megatransformer_jax.config.run import RunConfig
from megatransformer_jax.models.core import Pass, recur
from megatransformer_jax.models.implicit import SETTLING, settle
from megatransformer_jax.models.megatransformer import abstract_params, build_model, open_pass
from megatransformer_jax.nn.context import LayerContext
from megatransformer_jax.ops.masks import AttentionMask
from megatransformer_jax.sharding.rules import Sharder
from megatransformer_jax.types import DTypePolicy

ROWS, LENGTH, WIDTH = 3, 4, 5
ENOUGH = 80  # Iterations after which the toy's core stands still.


@struct.dataclass
class Toy(Pass):
    """A contraction that reads the token before."""

    def iterate(self, state, iteration, step=None):
        before = jnp.pad(state, ((0, 0), (1, 0), (0, 0)))[:, :-1]
        return jnp.tanh(state @ self.params + 0.3 * before + self.prepared)


def toy(params, prepared, segment_ids=None):
    mask = AttentionMask(query_segment_ids=segment_ids, key_segment_ids=segment_ids)
    return Toy(None, params, prepared, prepared, LayerContext(mask))


def inputs(seed=0):
    keys = jax.random.split(jax.random.key(seed), 3)
    params = 0.6 * jax.random.normal(keys[0], (WIDTH, WIDTH)) / WIDTH**0.5
    prepared, state = (jax.random.normal(k, (ROWS, LENGTH, WIDTH)) for k in keys[1:])
    return params, prepared, state


def square(state):
    """A loss whose gradient differs from place to place."""
    return jnp.sum(jnp.arange(1.0, 1 + state.size).reshape(state.shape) * state**2)


def gradients(num_steps, segment_ids=None, **options):
    """By the implicit gradient, for the toy's weights and what is injected."""
    params, prepared, state = inputs()

    @jax.jit
    def differentiate(params, prepared):
        def loss(*learned):
            core = toy(*learned, segment_ids)
            return square(settle(core, state, jnp.asarray(num_steps), **options).state)

        return jax.grad(loss, argnums=(0, 1))(params, prepared)

    return differentiate(params, prepared)


def unrolled_gradients(num_steps, backprop_depth):
    params, prepared, state = inputs()

    @jax.jit
    def differentiate(params, prepared):
        def loss(*learned):
            core = toy(*learned)
            out = recur(core, state, jnp.asarray(num_steps), backprop_depth=backprop_depth)
            return square(out)

        return jax.grad(loss, argnums=(0, 1))(params, prepared)

    return differentiate(params, prepared)


def cosine(one, other):
    one, other = (np.concatenate([np.ravel(leaf) for leaf in tree]) for tree in (one, other))
    return one @ other / np.linalg.norm(one) / np.linalg.norm(other)


def assert_trees_equal(one, other, **tolerance):
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(a, b, **tolerance)


@pytest.mark.parametrize("num_steps", [1, 7, [2, 5, 1], [[1, 2, 5, 3], [4, 4, 4, 4], [1, 1, 2, 1]]])
def test_one_term_is_backpropagation_through_the_last_iteration(num_steps):
    params, prepared, state = inputs()
    draws = jnp.asarray(num_steps)
    found = settle(toy(params, prepared), state, draws, terms=1)
    wanted = recur(toy(params, prepared), state, draws, backprop_depth=1)
    np.testing.assert_allclose(found.state, wanted, rtol=1e-6)
    deepest = np.max(np.atleast_2d(num_steps), axis=1) if np.ndim(num_steps) == 2 else num_steps
    np.testing.assert_array_equal(found.iterations, np.broadcast_to(deepest, ROWS))
    assert_trees_equal(
        gradients(num_steps, terms=1), unrolled_gradients(num_steps, 1), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("recomputes", [False, True])
@pytest.mark.parametrize("tolerance", [0.0, 1e-7])
def test_many_terms_are_backpropagation_through_all_iterations(recomputes, tolerance):
    options = {"tolerance": tolerance, "recomputes": recomputes}
    wanted = unrolled_gradients(ENOUGH, ENOUGH)
    assert cosine(gradients(ENOUGH, terms=4, **options), wanted) > 0.99
    assert_trees_equal(gradients(ENOUGH, terms=ENOUGH, **options), wanted, rtol=1e-4, atol=1e-4)


def test_many_terms_are_the_dense_solution():
    params, prepared, state = inputs()
    core = toy(params, prepared)
    settled = recur(core, state, jnp.int32(ENOUGH), backprop_depth=0)

    def iterate(flat, params, prepared):
        return toy(params, prepared).iterate(flat.reshape(state.shape), 0).ravel()

    by_state, by_params, by_injection = jax.jacobian(iterate, argnums=(0, 1, 2))(
        settled.ravel(), params, prepared
    )
    gradient = jax.grad(square)(settled).ravel()
    solved = np.linalg.solve(np.eye(len(gradient)) - np.asarray(by_state).T, gradient)
    wanted = [np.tensordot(solved, jacobian, 1) for jacobian in (by_params, by_injection)]
    found = gradients(ENOUGH, terms=ENOUGH)
    assert_trees_equal(found, tuple(wanted), rtol=1e-3, atol=1e-3)


def test_a_row_that_has_not_settled_has_no_more_terms_than_iterations():
    """Its Jacobian is not that of a fixed point, so its sum would mean nothing."""
    by_row = gradients([1, ENOUGH, 2], terms=ENOUGH)[1]
    for row, terms in ((0, 1), (1, ENOUGH), (2, 2)):
        alone = gradients([1, ENOUGH, 2], terms=terms)[1]
        np.testing.assert_allclose(by_row[row], alone[row], rtol=1e-5)
    # A row that has settled has all, however soon that was.
    settled = gradients([9, 9, 9], terms=ENOUGH, tolerance=0.9)[1]
    cut = gradients([9, 9, 9], terms=9)[1]
    assert np.all(np.any(np.asarray(settled) != np.asarray(cut), axis=(1, 2)))


def test_each_row_stops_where_it_settles_whatever_the_others_do():
    params, prepared, state = inputs()
    tolerance, bound = 1e-3, [40, 3, 40]
    draws = jnp.asarray(bound)
    found = settle(toy(params, prepared), state, draws, terms=1, tolerance=tolerance)
    for row in range(ROWS):
        here, count, now = slice(row, row + 1), 0, state[row : row + 1]
        core = toy(params, prepared[here])
        residual = 1.0
        while count < bound[row] - 1 and residual > tolerance:
            last, now, count = now, core.iterate(now, 0), count + 1
            residual = float(jnp.linalg.norm(now - last) / jnp.linalg.norm(now))
        wanted = core.iterate(now, 0)
        np.testing.assert_allclose(found.state[row], wanted[0], rtol=1e-5, atol=1e-6)
        assert found.iterations[row] == count + 1
        residual = jnp.linalg.norm(wanted - now) / jnp.linalg.norm(wanted)
        np.testing.assert_allclose(found.residual[row], residual, rtol=1e-3)
    assert found.iterations[1] == 3 < found.iterations[0] < 40


def test_padding_does_not_keep_a_row_from_settling():
    params, prepared, state = inputs()
    segments = jnp.ones((ROWS, LENGTH), jnp.int32).at[0, 2:].set(0).at[2].set(0)
    # What comes first does not see what follows, so the row of two tokens is the row cut there.
    core, options = toy(params, prepared, segments), {"terms": 1, "tolerance": 1e-3}
    found = settle(core, state.at[0, 2:].multiply(1e6), jnp.int32(40), **options)
    cut = settle(toy(params, prepared[:, :2]), state[:, :2], jnp.int32(40), **options)
    np.testing.assert_allclose(found.residual[0], cut.residual[0], rtol=1e-4)
    assert found.iterations[0] == cut.iterations[0]
    assert found.residual[2] == 0 and found.iterations[2] == 2  # Of padding only.


# ------------------------------------------------------------------------------
# The model.

TOKENS = jnp.arange(12, dtype=jnp.int32).reshape(2, 6)


def config(remat="none", dropout=0.0, **recurrence):
    options = {"adapter": "diagonal", "state_init": "normal", "injection_norm": True, **recurrence}
    return ModelConfig(
        vocab_size=32,
        width=16,
        max_length=8,
        prelude_layers=1,
        core_layers=2,
        coda_layers=0,
        residual_dropout_rate=dropout,
        attention=AttentionConfig(num_heads=2),
        mlp=MlpConfig(hidden_width=24),
        value_embedding=ValueEmbeddingConfig((1,), 4),
        remat=remat,
        recurrence=RecurrenceConfig(**options),
    )


def make(config):
    """A model, and parameters that hide nothing by being zero."""
    model = build_model(config, DTypePolicy(), Sharder(), "cpu")
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        mean = float(path[-1].key == "scale")
        return jnp.asarray(rng.normal(mean, 0.25, leaf.shape), leaf.dtype)

    return model, jax.tree_util.tree_map_with_path(draw, abstract_params(model))


def differentiated(config, num_steps, backprop_depth, compiled=False):
    """(logits, what was sown), and the gradients of a loss; or the compiled program."""
    model, params = make(config)

    def loss(params, num_steps):
        output, sown = model.apply(
            {"params": params},
            TOKENS,
            num_steps=num_steps,
            backprop_depth=backprop_depth,
            deterministic=not config.residual_dropout_rate,
            rngs={"state": jax.random.key(1), "dropout": jax.random.key(2)},
            mutable=[SETTLING],
        )
        return square(output.logits), (output.logits, sown)

    step = jax.jit(jax.grad(loss, has_aux=True))
    if compiled:
        return step.lower(params, jnp.int32(num_steps)).compile()
    found, aux = step(params, jnp.int32(num_steps))
    return aux, found


def test_every_parameter_has_the_gradient_of_the_last_iteration():
    """Also if the backward pass computes that iteration again."""
    (logits, sown), found = differentiated(config("full", gradient="implicit"), 5, 1)
    (wanted_logits, nothing), wanted = differentiated(config(), 5, 1)
    np.testing.assert_allclose(logits, wanted_logits, rtol=1e-4, atol=1e-4)
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(wanted), strict=True
    ):
        name = jax.tree_util.keystr(path)
        size = float(np.max(np.abs(b)))
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4 * size, err_msg=name)
        assert size > 0, name
    assert sown[SETTLING]["implicit_iterations"] == (5.0,)
    assert sown[SETTLING]["implicit_residual"][0] > 0
    assert not nothing


def test_all_iterations_have_the_same_dropout():
    model, params = make(config(dropout=0.5, gradient="implicit"))
    core = open_pass(model, params, jnp.ones((1, 4, 16)), _context(model))
    core = dataclasses.replace(core, dropout_key=jax.random.key(3))
    first = core.place(jax.random.normal(jax.random.key(4), (1, 4, 16)))
    found = settle(core, first, jnp.int32(3), terms=1).state
    state = first
    for _ in range(3):
        state = core.iterate(state, 0)
    np.testing.assert_allclose(found, state, rtol=1e-5, atol=1e-6)
    assert float(jnp.max(jnp.abs(core.iterate(first, 0) - core.iterate(first, 1)))) > 1e-3


def _context(model):
    values = model.config.value_layers("core")
    rows = jnp.ones((len(values), 1, 4, 2, 8))
    context = LayerContext(AttentionMask(is_causal=True), deterministic=False)
    return dataclasses.replace(context, value_embeddings={"core": rows})


def test_memory_depends_neither_on_iterations_nor_on_terms():
    """By the compiler's count; truncated backpropagation keeps something of each iteration."""

    def temporary(gradient, depth):
        made = differentiated(config(gradient=gradient), 64, depth, compiled=True)
        return made.memory_analysis().temp_size_in_bytes

    few, many = (temporary("implicit", terms) for terms in (4, 32))
    assert abs(many - few) < 0.01 * few
    few, many = (temporary("truncated", depth) for depth in (4, 32))
    assert many - few > 28 * TOKENS.size * 16 * 4


def test_what_an_implicit_gradient_cannot_take_is_refused():
    for options, name, words in (
        ({"adapter": "none", "state_init": "none", "backprop_depth": 8}, "gradient", "injected"),
        ({"loop_embedding": True}, "loop_embedding", "with gradient='implicit'"),
        ({"loop_lora_rank": 2}, "loop_lora_rank", "with gradient='implicit'"),
        ({"kept_every": 2}, "kept_every", "with gradient='implicit'"),
        ({"unroll": 2}, "unroll", "with gradient='implicit'"),
    ):
        with pytest.raises(ConfigError, match=words) as caught:
            RecurrenceConfig(gradient="implicit", **options)
        assert caught.value.path == name
    with pytest.raises(ConfigError, match="set gradient='implicit'"):
        RecurrenceConfig(implicit_tolerance=0.1)


@pytest.mark.parametrize(
    ("name", "train"),
    [
        (
            "train.stability.fixed_point_weight",
            TrainConfig(stability=StabilityConfig(fixed_point_weight=0.1)),
        ),
        (
            "model.recurrence.gradient",
            TrainConfig(supervision=SupervisionConfig(prior="uniform", mix=1.0)),
        ),
    ],
)
def test_a_run_has_no_term_that_the_implicit_gradient_leaves_out(name, train):
    model = config(gradient="implicit", sampling="fixed", max_steps=8)
    data = DataConfig(source="reasoning", batch_size=2, sequence_length=6)
    with pytest.raises(ConfigError, match="set it to") as caught:
        RunConfig(model=model, data=data, train=train)
    assert caught.value.path == name
