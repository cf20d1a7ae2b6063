"""The step moves running statistics by its own rule, and the optimiser never does."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from megatransformer_jax.config.data import DataConfig
from megatransformer_jax.config.layers import AttentionConfig, PeerConfig
from megatransformer_jax.config.loop import TrainConfig
from megatransformer_jax.config.model import MlpConfig, ModelConfig
from megatransformer_jax.config.recurrence import RecurrenceConfig
from megatransformer_jax.config.run import RunConfig
from megatransformer_jax.models.megatransformer import build_model
from megatransformer_jax.nn.peer import is_statistic
from megatransformer_jax.sharding.rules import Sharder
from megatransformer_jax.training.evaluation_params import evaluation_params
from megatransformer_jax.training.optimizers import build_optimizer
from megatransformer_jax.training.state import init_state
from megatransformer_jax.training.step import make_train_step
from megatransformer_jax.training.trainable import keep_statistics, update_statistics
from megatransformer_jax.types import Batch, DTypePolicy

ROWS, LENGTH = 4, 6
PEER = PeerConfig(num_experts=16, num_heads=2, top_k=2, key_dim=4, query_momentum=0.75)
MODEL = ModelConfig(
    vocab_size=16,
    width=8,
    max_length=8,
    prelude_layers=1,
    core_layers=1,
    coda_layers=0,
    attention=AttentionConfig(num_heads=2),
    mlp=MlpConfig(kind="peer", peer=PEER),
    recurrence=RecurrenceConfig(
        sampling="fixed", mean_steps=3, max_steps=8, backprop_depth=2, state_init="zero"
    ),
)


def example_batch():
    rng = np.random.default_rng(0)
    tokens = jnp.asarray(rng.integers(0, 16, (ROWS, LENGTH)), jnp.int32)
    # The last row is half padding.
    segment_ids = jnp.ones((ROWS, LENGTH), jnp.int32).at[3, 3:].set(0)
    positions = jnp.broadcast_to(jnp.arange(LENGTH), tokens.shape)
    return Batch(tokens, tokens, segment_ids.astype(jnp.float32), segment_ids, positions)


PARTS = 2


@pytest.fixture(scope="module")
def one_step():
    """(model, state before, state after) of a step of two parts that pushes every weight."""
    data = DataConfig(source="reasoning", batch_size=ROWS, sequence_length=LENGTH)
    train = TrainConfig(accumulation=PARTS)
    config = RunConfig(model=MODEL, data=data, train=train)
    model = build_model(MODEL, DTypePolicy(), Sharder(), "cpu")
    # Moves all that has a gradient, were it ever so small.
    optimizer = optax.chain(optax.scale_by_sign(), optax.scale(-0.01))
    state = jax.jit(lambda key: init_state(model, optimizer, key))(jax.random.key(0))
    after, metrics = jax.jit(make_train_step(model, optimizer, config))(state, example_batch())
    assert metrics["skipped_steps"] == 0
    return model, state, after


def test_prelude_statistics_move_towards_the_mean_of_the_parts(one_step):
    model, before, after = one_step
    batch = example_batch()

    @jax.jit
    def look(params):
        return model.apply(
            {"params": params},
            batch.tokens,
            segment_ids=batch.segment_ids,
            num_steps=0,
            capture_intermediates=lambda module, _: module.name == "mlp_norm_in",
            mutable=["intermediates"],
        )[1]

    seen = look(before.params)
    (hidden,) = seen["intermediates"]["prelude"]["layer_0"]["mlp_norm_in"]["__call__"]
    old, new = (state.params["prelude"]["layer_0"]["mlp"] for state in (before, after))
    queries = np.einsum("btd,dnc->btnc", hidden, old["query"]).reshape(ROWS, LENGTH, -1)
    means, variances = [], []
    for part in range(PARTS):
        tokens = queries[part::PARTS][np.asarray(batch.segment_ids)[part::PARTS] > 0]
        means.append(tokens.mean(0))
        variances.append(tokens.var(0, ddof=1))
    np.testing.assert_allclose(new["query_mean"], 0.25 * np.mean(means, 0), rtol=1e-4, atol=1e-6)
    wanted = 0.75 + 0.25 * np.mean(variances, 0)
    np.testing.assert_allclose(new["query_var"], wanted, rtol=1e-4)
    assert new["query_count"] == old["query_count"] == 0


def test_every_weight_moves_by_the_optimiser_and_the_core_has_statistics_too(one_step):
    _, before, after = one_step
    new = after.params["core"]["layers"]["layer_0"]["mlp"]
    assert np.all(np.abs(new["query_mean"]) > 0) and np.all(new["query_var"] < 1.5)
    moved = jax.tree_util.tree_map_with_path(
        lambda path, a, b: is_statistic(path) or float(jnp.max(jnp.abs(a - b))), before.params,
        after.params,
    )  # fmt: skip
    assert all(
        step is True or step == pytest.approx(0.01, rel=1e-3) for step in jax.tree.leaves(moved)
    )


def test_only_iterations_with_influence_count():
    """Of two iterations with gradients, a draw of 1 masks the first."""
    model = build_model(MODEL, DTypePolicy(), Sharder(), "cpu")
    params = jax.jit(lambda key: init_state(model, optax.sgd(1.0), key))(jax.random.key(0)).params
    batch = example_batch()

    @jax.jit
    def counts(num_steps):
        def loss(params):
            output = model.apply(
                {"params": params},
                batch.tokens,
                num_steps=num_steps,
                backprop_depth=2,
                deterministic=False,
                rngs={"dropout": jax.random.key(0)},
            )
            return jnp.sum(jnp.sin(output.logits))

        return jax.grad(loss)(params)["core"]["layers"]["layer_0"]["mlp"]["query_count"]

    assert [float(counts(jnp.int32(steps))) for steps in (5, 1)] == [2, 1]


def test_nothing_seen_changes_nothing_and_frozen_statistics_stay():
    old = {
        "mlp": {"query_mean": jnp.ones(2), "query_var": jnp.ones(2), "query_count": jnp.zeros(())}
    }
    moved = jax.tree.map(lambda leaf: leaf + 1, old)
    silent = jax.tree.map(jnp.zeros_like, old)
    kept = update_statistics(moved, old, silent, 0.9)
    jax.tree.map(np.testing.assert_array_equal, kept, old)
    part = {"mlp": {"query_mean": jnp.ones(2), "query_count": None}}
    result = update_statistics(
        part, part, {"mlp": {"query_mean": jnp.ones(2), "query_count": None}}, 0.0
    )
    np.testing.assert_array_equal(result["mlp"]["query_mean"], 1)


def test_averages_of_weights_have_the_latest_statistics():
    latest = {"query_mean": jnp.ones(2), "up": jnp.ones(2)}
    average = jax.tree.map(lambda leaf: leaf / 2, latest)
    kept = keep_statistics(average, latest)
    assert kept["query_mean"] is latest["query_mean"] and kept["up"] is average["up"]


def test_an_average_is_evaluated_with_the_latest_statistics():
    config = RunConfig(
        model=dataclasses.replace(MODEL, max_length=256),
        data=DataConfig(source="reasoning"),
        train=TrainConfig(ema_decay=0.9),
    )
    model = build_model(config.model, DTypePolicy(), Sharder(), "cpu")
    optimizer = build_optimizer(config.optimizer, config.train.steps, config.train.ema_decay)
    state = jax.jit(lambda key: init_state(model, optimizer, key))(jax.random.key(0))
    latest = state.params["prelude"]["layer_0"]["mlp"]
    latest["query_mean"] += 1.0
    latest["query"] += 1.0
    judged = evaluation_params(state, config)["prelude"]["layer_0"]["mlp"]
    np.testing.assert_array_equal(judged["query_mean"], latest["query_mean"])
    assert not np.allclose(judged["query"], latest["query"])


def test_evaluation_uses_running_statistics():
    peer = dataclasses.replace(MODEL, core_layers=0, recurrence=RecurrenceConfig())
    model = build_model(peer, DTypePolicy(), Sharder(), "cpu")
    params = jax.jit(lambda key: init_state(model, optax.sgd(1.0), key))(jax.random.key(0)).params
    tokens = example_batch().tokens

    @jax.jit
    def logits(params, tokens):
        return model.apply({"params": params}, tokens, num_steps=0).logits

    together, alone = logits(params, tokens), logits(params, tokens.at[1:].set(0))
    np.testing.assert_allclose(together[0], alone[0], atol=1e-6)
    params["prelude"]["layer_0"]["mlp"]["query_mean"] += 1.0
    assert np.abs(logits(params, tokens) - together).max() > 1e-4
