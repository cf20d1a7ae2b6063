import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from megatransformer_jax.config.model import AttentionConfig, MlpConfig, ModelConfig, NormConfig
from megatransformer_jax.config.optimizer import OptimizerConfig
from megatransformer_jax.config.recurrence import RecurrenceConfig
from megatransformer_jax.models.megatransformer import build_model, init_params
from megatransformer_jax.sharding.rules import Sharder
from megatransformer_jax.training.optimizers import build_optimizer
from megatransformer_jax.training.weight_decay import decay_mask
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
    with pytest.raises(ValueError, match="unknown optimiser 'adamx'; known: adamw"):
        build_optimizer(config, 100)


def test_the_state_has_the_same_arrays_whatever_may_change_on_resume():
    params = {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}
    states = [
        build_optimizer(config, total_steps=10).init(params)
        for config in (
            OptimizerConfig(warmup_steps=2),
            OptimizerConfig(warmup_steps=2, clip_norm=None, weight_decay=0.0, beta2=0.5),
            OptimizerConfig(warmup_steps=0, schedule="wsd", decay_steps=3, learning_rate=1.0),
        )
    ]
    for state in states[1:]:
        assert jax.tree.structure(state) == jax.tree.structure(states[0])
