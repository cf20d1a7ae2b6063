"""Each measurement against NumPy, the attention operation or the training step's own draws."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from attention_reference import attend

from megatransformer_jax.config.build import build
from megatransformer_jax.config.recurrence import RecurrenceConfig
from megatransformer_jax.evaluation.diagnostics.measures import (
    MAX_SAMPLES,
    attention_weights,
    count_draws,
    layer_of,
    layer_states,
    norms_by_layer,
    observe_coda,
    observe_prelude,
    summarize,
    token_correlation,
)
from megatransformer_jax.models.core import draw_num_steps
from megatransformer_jax.models.megatransformer import (
    build_model,
    init_params,
    off_mesh,
    pass_context,
)
from megatransformer_jax.nn.attention import SelfAttention
from megatransformer_jax.ops.masks import AttentionMask
from megatransformer_jax.ops.positions import alibi_slopes
from megatransformer_jax.sharding.rules import Sharder
from megatransformer_jax.training.step import step_keys
from megatransformer_jax.types import Batch, DTypePolicy


def random(*shape: int, seed: int = 0) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


def cosine_of_pairs(states: np.ndarray, is_token: np.ndarray) -> float:
    """Pair by pair, as the definition says."""
    means = []
    for row, counts in zip(states, is_token, strict=True):
        units = [v / np.linalg.norm(v) for v in row[counts]]
        pairs = [a @ b for i, a in enumerate(units) for j, b in enumerate(units) if i != j]
        if pairs:
            means.append(np.mean(pairs))
    return float(np.mean(means))


def test_token_correlation_is_the_mean_cosine_of_pairs():
    states = np.asarray(random(3, 6, 5))
    is_token = np.ones((3, 6), bool)
    is_token[1, 3:] = False
    is_token[2, 1:] = False  # One token makes no pair.
    found = token_correlation(jnp.asarray(states), jnp.asarray(is_token))
    np.testing.assert_allclose(found, cosine_of_pairs(states, is_token), rtol=1e-5)


def test_tokens_of_one_direction_correlate_fully():
    states = random(1, 1, 4) * jnp.array([1.0, 2.0, 3.0])[None, :, None]
    np.testing.assert_allclose(token_correlation(states, jnp.ones((1, 3), bool)), 1.0, rtol=1e-6)
    assert token_correlation(states, jnp.zeros((1, 3), bool)) == 0


def test_a_summary_samples_the_states_and_knows_padding():
    states, is_token = random(2, 40, 128), jnp.arange(40) < jnp.array([40, 10])[:, None]
    summary = summarize(states, is_token)
    assert summary.sample.shape == (MAX_SAMPLES,)
    assert np.isin(np.asarray(summary.sample), np.asarray(states)).all()
    real = np.asarray(states)[np.asarray(is_token)]
    np.testing.assert_allclose(summary.rms, np.sqrt(np.mean(real**2)), rtol=1e-5)
    assert np.isin(np.asarray(summary.sample)[np.asarray(summary.is_token)], real).all()
    # 50 of 80 tokens; five standard deviations.
    assert abs(np.mean(summary.is_token) - 5 / 8) < 0.04


@pytest.mark.parametrize(("window", "softcap", "has_alibi"), [(None, None, False), (3, 2.0, True)])
def test_attention_weights_reproduce_attention(window, softcap, has_alibi):
    query, key, value = random(2, 7, 4, 6), random(2, 7, 2, 6, seed=1), random(2, 7, 2, 6, seed=2)
    segments = jnp.array([[1, 1, 1, 2, 2, 2, 2], [1, 1, 1, 1, 1, 0, 0]])
    mask = AttentionMask(
        is_causal=True, window=window, query_segment_ids=segments, key_segment_ids=segments
    )
    options = {
        "logit_softcap": softcap,
        "alibi_slopes": alibi_slopes(4) if has_alibi else None,
    }
    weights = attention_weights(query, key, mask, **options)
    expected = attend(query, key, value, mask, platform="cpu", **options)
    mixed = jnp.einsum("bnts,bsnh->btnh", weights, jnp.repeat(value, 2, axis=2))
    np.testing.assert_allclose(mixed, expected, atol=1e-5)
    sums = np.asarray(weights.sum(-1))
    np.testing.assert_allclose(sums, np.broadcast_to(segments[:, None] > 0, sums.shape), atol=1e-6)
    assert not np.triu(np.asarray(weights), 1).any()


def test_layers_have_names():
    paths = {
        "core/layers/layer_12/mlp/up": "core/layers/layer_12",
        "prelude/layer_0/attention/qkv": "prelude/layer_0",
        "core/adapter/kernel": "core/adapter",
        "embedding/table": "embedding",
        "core_in": "core_in",
    }
    assert {path: layer_of(path) for path in paths} == paths


def test_norms_by_layer_add_up_to_the_norm_of_the_tree():
    tree = {
        "embedding": {"table": random(3, 4)},
        "core": {
            "adapter": {"kernel": random(5)},
            "layers": {"layer_0": {"a": random(2, 2), "b": {"c": random(3, seed=1)}}},
        },
    }
    # Running statistics have no gradient of their own.
    with_statistics = {**tree, "coda": {"layer_0": {"mlp": {"query_mean": random(4)}}}}
    norms = norms_by_layer(with_statistics)
    assert norms.keys() == {"embedding", "core/adapter", "core/layers/layer_0"}
    layer = tree["core"]["layers"]["layer_0"]
    np.testing.assert_allclose(norms["core/layers/layer_0"], optax.tree.norm(layer), rtol=1e-6)
    total = np.sqrt(sum(float(norm) ** 2 for norm in norms.values()))
    np.testing.assert_allclose(total, optax.tree.norm(tree), rtol=1e-6)


def test_draws_are_those_of_the_steps():
    config = RecurrenceConfig(mean_steps=3, max_steps=7, backprop_depth=1, draw_per="sequence")
    key = jax.random.key(3)
    counts = np.asarray(count_draws(config, key, 5, 9, 4, 2))
    # Step n is made when n - 1 steps are done.
    draw = jax.jit(lambda done: draw_num_steps(config, step_keys(key, done).depth, done, 4, 2))
    draws = [np.asarray(draw(done)) for done in range(4, 9)]
    np.testing.assert_array_equal(counts, np.bincount(np.concatenate(draws), minlength=8)[1:])
    assert counts.sum() == 5 * 4


@pytest.fixture(scope="module")
def model_and_rows():
    config = build(
        {
            "model": {
                "vocab_size": 16,
                "width": 8,
                "prelude_layers": 2,
                "core_layers": 0,
                "coda_layers": 3,
                "attention": {"num_heads": 2},
                "mlp": {"hidden_width": 8},
                "sharing": {"scheme": "cycle_rev", "coda_unique": 2},
            },
            "data": {"source": "reasoning"},
        }
    ).model
    model = off_mesh(build_model(config, DTypePolicy(), Sharder(), "cpu"))
    tokens = jax.random.randint(jax.random.key(0), (1, 5), 0, 16)
    ones = jnp.ones((1, 5), jnp.int32)
    rows = Batch(tokens, tokens, ones.astype(jnp.float32), ones, jnp.arange(5)[None])
    return model, init_params(model, jax.random.key(1)), rows


def test_observed_layers_are_the_models(model_and_rows):
    """Layers that share a block come in their order, and the parts make the whole."""
    model, params, rows = model_and_rows

    @jax.jit
    def observe(params):
        entered, prelude = observe_prelude(model, params, rows)
        x = entered.x
        coda = observe_coda(model, params, x, entered)
        context = pass_context(model.config, rows.positions, rows.segment_ids, 8)
        _, hidden = model.apply({"params": params}, x, context, method="run_coda")
        states = layer_states(model, params, rows, mean_steps=0, num_steps=0, seed=0)
        return x, prelude, coda, hidden, states

    x, prelude, coda, hidden, states = observe(params)
    assert len(prelude) == 2 and len(coda) == 3
    np.testing.assert_array_equal(prelude[-1].states, x)
    np.testing.assert_allclose(coda[-1].states, hidden, rtol=1e-6)
    # cycle_rev of two: the second layer's block is not the third's.
    assert not np.allclose(coda[0].states, coda[1].states)
    assert states.core == {}
    np.testing.assert_allclose(
        states.outer["coda/layer_1"].correlation,
        cosine_of_pairs(np.asarray(coda[1].states), np.ones((1, 5), bool)),
        rtol=1e-4,
    )


def test_observation_costs_nothing_when_it_is_off(model_and_rows, monkeypatch):
    model, params, rows = model_and_rows

    def program() -> str:
        return str(
            jax.make_jaxpr(
                lambda params: model.apply({"params": params}, rows.tokens, num_steps=1).logits
            )(params)
        )

    before = program()
    monkeypatch.setattr(SelfAttention, "sow", lambda self, *arguments, **options: False)
    assert program() == before
    assert jax.tree.structure(init_params(model, jax.random.key(1))) == jax.tree.structure(params)
