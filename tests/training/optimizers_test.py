import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from megatransformer_jax.config.layers import AttentionConfig
from megatransformer_jax.config.model import MlpConfig, ModelConfig, NormConfig
from megatransformer_jax.config.optimizer import (
    OPTIMIZERS,
    AdafactorConfig,
    GrokfastConfig,
    MuonConfig,
    OptimizerConfig,
    SgdConfig,
)
from megatransformer_jax.config.recurrence import RecurrenceConfig
from megatransformer_jax.models.megatransformer import build_model, init_params
from megatransformer_jax.sharding.rules import Sharder
from megatransformer_jax.training.evaluation_params import find_average
from megatransformer_jax.training.optimizers import build_optimizer, decay_mask
from megatransformer_jax.types import DTypePolicy

CONFIG = OptimizerConfig(schedule="constant", warmup_steps=0, final_fraction=0.1)


def test_adamw_equals_the_formula():
    config = dataclasses.replace(CONFIG, clip_norm=None, weight_decay=0.1)
    optimizer = build_optimizer(config, 100)
    params = {"kernel": jnp.array([[1.0, -2.0], [3.0, 4.0]])}
    gradients = {"kernel": jnp.array([[0.1, 0.2], [-0.3, 0.0]])}
    updates, _ = optimizer.update(gradients, optimizer.init(params), params)
    g, w = np.asarray(gradients["kernel"]), np.asarray(params["kernel"])
    # After one step the bias-corrected moments are g and g^2.
    expected = -config.learning_rate * (g / (np.abs(g) + config.eps) + 0.1 * w)
    np.testing.assert_allclose(updates["kernel"], expected, rtol=1e-5)


def test_gradients_are_clipped_by_their_global_norm():
    # Without the moments' normalisation one would see the clipping at once; with it, two
    # gradients that differ only in length beyond the limit must give the same update.
    optimizer = build_optimizer(dataclasses.replace(CONFIG, clip_norm=1.0), 100)
    params = {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}
    gradients = {"kernel": jnp.full((2, 2), 30.0), "bias": jnp.full(2, 40.0)}
    _, state = optimizer.update(gradients, optimizer.init(params), params)
    moment = optax.tree_utils.tree_get(state, "mu")
    assert float(optax.tree.norm(moment)) == pytest.approx((1 - CONFIG.beta1) * 1.0, rel=1e-5)


def test_decay_goes_by_name_and_not_by_rank():
    params = {
        "norm": {"scale": jnp.ones(4)},
        "attention": {"qkv": jnp.ones((4, 3, 2, 2)), "qk_bias": jnp.ones((2, 2, 2))},
        "adapter": {"a_log": jnp.ones(4), "dt_bias": jnp.ones(4), "b_matrix": jnp.ones((4, 4))},
        "embedding": {"embedding": jnp.ones((8, 4))},
        "head": {"kernel": jnp.ones((4, 8)), "bias": jnp.ones((8,))},
    }
    assert decay_mask(params) == {
        "norm": {"scale": False},
        "attention": {"qkv": True, "qk_bias": False},
        "adapter": {"a_log": False, "dt_bias": False, "b_matrix": False},
        "embedding": {"embedding": False},
        "head": {"kernel": True, "bias": False},
    }


@pytest.mark.parametrize("adapter", ["linear", "diagonal"])
def test_every_parameter_of_a_real_model_is_sorted_as_documented(adapter):
    config = ModelConfig(
        vocab_size=32,
        width=16,
        attention=AttentionConfig(num_heads=2, qkv_bias=True, output_bias=True, qk_bias=True),
        mlp=MlpConfig(hidden_width=8, bias=True),
        norm=NormConfig(kind="layernorm", bias=True),
        tie_embeddings=False,
        head_bias=True,
        recurrence=RecurrenceConfig(adapter=adapter),
    )
    model = build_model(config, DTypePolicy(), Sharder(), "cpu")
    params = jax.eval_shape(lambda key: init_params(model, key), jax.random.key(0))
    flat = jax.tree_util.tree_flatten_with_path(decay_mask(params))[0]
    decayed = {path[-1].key for path, value in flat if value}
    undecayed = {path[-1].key for path, value in flat if not value}
    adapter = set() if adapter == "diagonal" else {"state_kernel", "embedding_kernel"}
    assert decayed == {"qkv", "output", "up", "down", "head"} | adapter
    assert undecayed >= {"scale", "bias", "embedding"}
    endings = ("scale", "bias", "embedding", "a_log", "b_matrix")
    assert all(name.endswith(endings) for name in undecayed)


def test_weight_decay_moves_matrices_only():
    optimizer = build_optimizer(CONFIG, 100)
    params = {"kernel": jnp.ones((2, 2)), "scale": jnp.ones(2)}
    zero = jax.tree.map(jnp.zeros_like, params)
    updates, _ = optimizer.update(zero, optimizer.init(params), params)
    np.testing.assert_allclose(
        updates["kernel"], -CONFIG.learning_rate * CONFIG.weight_decay * np.ones((2, 2)), rtol=1e-6
    )
    assert not np.any(updates["scale"])


def test_optimizer_state_is_float32():
    optimizer = build_optimizer(CONFIG, 100)
    state = optimizer.init({"kernel": jnp.ones((2, 2), jnp.float32)})
    floats = [x for x in jax.tree.leaves(state) if jnp.issubdtype(x.dtype, jnp.floating)]
    assert floats and all(x.dtype == jnp.float32 for x in floats)


def test_unknown_optimizer_lists_the_known_ones():
    config = dataclasses.replace(CONFIG)
    object.__setattr__(config, "name", "adamx")  # The config itself refuses it.
    known = "adamw, adafactor, lion, muon, sgd, schedule_free_adamw, schedule_free_sgd"
    with pytest.raises(ValueError, match=f"unknown optimiser 'adamx'; known: {known}"):
        build_optimizer(config, 100)


# What may change on resume, by optimiser.
CHANGES = {
    "adamw": {"beta2": 0.5},
    "adafactor": {"adafactor": AdafactorConfig(clip_rms=None, scale_by_parameter=False)},
    "lion": {"beta1": 0.5},
    "muon": {"muon": MuonConfig(consistent_rms=None, nesterov=False, newton_schulz_steps=3)},
    "sgd": {"sgd": SgdConfig(nesterov=True)},
    "schedule_free_adamw": {"beta2": 0.5},
    "schedule_free_sgd": {},
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_state_has_the_same_arrays_whatever_may_change_on_resume(name):
    params = {"up": jnp.ones((2, 1, 2)), "bias": jnp.ones(2)}
    schedule = "constant" if name.startswith("schedule_free") else "warmup_cosine"
    first = OptimizerConfig(name=name, schedule=schedule, warmup_steps=2)
    changed = [
        dataclasses.replace(first, clip_norm=None, weight_decay=0.0, **CHANGES[name]),
        dataclasses.replace(first, warmup_steps=0, groups=("up: weight_decay=1",)),
        dataclasses.replace(first, schedule="constant", learning_rate=1.0),
    ]
    state = build_optimizer(first, total_steps=10).init(params)
    for config in changed:
        other = build_optimizer(config, total_steps=10).init(params)
        assert jax.tree.structure(other) == jax.tree.structure(state)


# Ours and optax's own, for steps of constant rate without decay, which ours decouples from all.
PARITY = {
    "adafactor": (
        {"adafactor": AdafactorConfig(min_factored_size=2)},
        optax.adafactor(0.01, min_dim_size_to_factor=2),
    ),
    "adafactor_plain": (
        {
            "name": "adafactor",
            "adafactor": AdafactorConfig(decay_power=0.6, clip_rms=None, scale_by_parameter=False),
        },
        optax.adafactor(
            0.01, decay_rate=0.6, clipping_threshold=None, multiply_by_parameter_scale=False
        ),
    ),
    "lion": ({"beta1": 0.8, "beta2": 0.9}, optax.lion(0.01, 0.8, 0.9, weight_decay=0.0)),
    "sgd": ({}, optax.sgd(0.01, momentum=0.9)),
    "sgd_plain": ({"name": "sgd", "sgd": SgdConfig(momentum=0.0)}, optax.sgd(0.01)),
    "sgd_nesterov": (
        {"name": "sgd", "sgd": SgdConfig(momentum=0.8, nesterov=True)},
        optax.sgd(0.01, momentum=0.8, nesterov=True),
    ),
    "adamw": ({"eps": 1e-3}, optax.adamw(0.01, 0.9, 0.95, eps=1e-3, weight_decay=0.0)),
    "schedule_free_adamw": (
        {"beta1": 0.8, "beta2": 0.9},
        optax.contrib.schedule_free_adamw(0.01, b1=0.8, b2=0.9),
    ),
}


def three_updates(optimizer, params):
    rng = np.random.default_rng(0)
    state, update, history = optimizer.init(params), jax.jit(optimizer.update), []
    for _ in range(3):
        gradients = {k: jnp.asarray(rng.normal(size=p.shape), p.dtype) for k, p in params.items()}
        updates, state = update(gradients, state, params)
        params = optax.apply_updates(params, updates)
        history.append(updates)
    return history


@pytest.mark.parametrize("case", PARITY)
def test_updates_are_those_of_optax(case):
    options, theirs = PARITY[case]
    config = OptimizerConfig(
        schedule="constant", warmup_steps=0, learning_rate=0.01, clip_norm=None, weight_decay=0.0,
        **{"name": case, **options},
    )  # fmt: skip
    params = {"kernel": jnp.linspace(-1.0, 2.0, 12).reshape(3, 4), "bias": jnp.ones(4)}
    ours, expected = (
        three_updates(build_optimizer(config, 10), params),
        three_updates(theirs, params),
    )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-8), ours, expected
    )


def test_schedule_free_follows_the_papers_sequences_on_a_quadratic():
    """arXiv 2405.15682: x is averaged with weights of squared rates; y is what is trained."""
    config = OptimizerConfig(
        name="schedule_free_sgd", schedule="constant", warmup_steps=3, learning_rate=0.2,
        beta1=0.8, weight_decay=0.0, clip_norm=None,
    )  # fmt: skip
    optimizer = build_optimizer(config, 20)
    curvature, target = np.array([1.0, 3.0]), np.array([0.5, -2.0])
    params = {"w": jnp.array([2.0, 1.0])}
    state = optimizer.init(params)
    x = z = np.array([2.0, 1.0])
    weights = 0.0
    for step in range(12):
        y = 0.2 * z + 0.8 * x
        np.testing.assert_allclose(params["w"], y, atol=1e-5)
        rate = 0.2 * min(1, (step + 1) / 3)
        gradient = curvature * (y - target)
        z = z - rate * gradient
        weights += rate**2
        x = x + (rate**2 / weights) * (z - x)
        updates, state = optimizer.update({"w": jnp.asarray(gradient, jnp.float32)}, state, params)
        params = optax.apply_updates(params, updates)
        average = optax.contrib.schedule_free_eval_params(find_average(state), params)
        np.testing.assert_allclose(average["w"], x, atol=1e-5)
    assert np.abs(x - target).max() < 0.5  # From 3.


def test_the_filter_sees_clipped_gradients():
    config = dataclasses.replace(
        CONFIG, name="sgd", beta1=0.9, clip_norm=1.0, learning_rate=1.0, weight_decay=0.0,
        sgd=SgdConfig(momentum=0.0), grokfast=GrokfastConfig(filter="ma", window=1, lamb=3.0),
    )  # fmt: skip
    optimizer = build_optimizer(config, 10)
    params = {"kernel": jnp.ones(4)}
    updates, _ = optimizer.update({"kernel": jnp.full(4, 50.0)}, optimizer.init(params), params)
    np.testing.assert_allclose(updates["kernel"], -(1 + 3.0) * 0.5, rtol=1e-6)
