"""What is frozen stays bit for bit as it was and costs the optimiser nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from megatransformer_jax.config.data import DataConfig
from megatransformer_jax.config.fine_tuning import FineTuningConfig, LoraConfig
from megatransformer_jax.config.layers import AttentionConfig
from megatransformer_jax.config.loop import TrainConfig
from megatransformer_jax.config.model import MlpConfig, ModelConfig
from megatransformer_jax.config.optimizer import OPTIMIZERS, OptimizerConfig
from megatransformer_jax.config.option import ConfigError
from megatransformer_jax.config.recurrence import RecurrenceConfig
from megatransformer_jax.config.run import RunConfig
from megatransformer_jax.models.megatransformer import build_model
from megatransformer_jax.sharding.rules import Sharder
from megatransformer_jax.training.evaluation_params import evaluation_params
from megatransformer_jax.training.optimizers import build_optimizer
from megatransformer_jax.training.state import TrainState, init_state
from megatransformer_jax.training.step import make_train_step
from megatransformer_jax.training.trainable import (
    join_params,
    map_named,
    split_params,
    trained_mask,
)
from megatransformer_jax.types import Batch, DTypePolicy

ROWS, LENGTH, VOCAB = 2, 8, 16
LORA = FineTuningConfig(init_from="runs/base", lora=LoraConfig(rank=2, targets=("down$",)))
TREE = {"core": {"mlp": {"up": 1.0, "down": 2.0}, "norm": {"scale": 3.0}}, "head": 4.0}


def run_config(fine_tuning, **train):
    model = ModelConfig(
        vocab_size=VOCAB,
        width=8,
        max_length=LENGTH,
        core_layers=1,
        coda_layers=0,
        attention=AttentionConfig(num_heads=2),
        mlp=MlpConfig(hidden_width=8),
        recurrence=RecurrenceConfig(mean_steps=2, backprop_depth=2, max_steps=4),
    )
    return RunConfig(
        model=model,
        data=DataConfig(source="reasoning", batch_size=ROWS, sequence_length=LENGTH),
        optimizer=OptimizerConfig(
            learning_rate=0.05,
            weight_decay=0.5,
            schedule="constant",
            clip_norm=None,
        ),
        train=TrainConfig(**train),
        fine_tuning=fine_tuning,
    )


def example_batch():
    tokens = np.random.default_rng(0).integers(0, VOCAB, (ROWS, LENGTH)).astype(np.int32)
    positions = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), tokens.shape)
    ones = np.ones_like(tokens)
    return Batch(tokens, np.roll(tokens, -1, 1), ones.astype(np.float32), ones, positions)


def start(config):
    optimizer = build_optimizer(config.optimizer, config.train.steps, config.train.ema_decay)
    model = build_model(config.model, DTypePolicy(), Sharder(), "cpu")
    make = jax.jit(lambda key: init_state(model, optimizer, key, fine_tuning=config.fine_tuning))
    return model, optimizer, make(jax.random.key(0))


@pytest.mark.parametrize(
    ("options", "trained"),
    [
        ({}, {1, 2, 3, 4}),
        ({"freeze": ("mlp/up$", "^head")}, {2, 3}),
        ({"train_only": ("scale",)}, {3}),
    ],
)
def test_patterns_choose_by_path(options, trained):
    parts = split_params(TREE, FineTuningConfig(**options))
    assert set(jax.tree.leaves(parts[0])) == trained
    assert set(jax.tree.leaves(parts[1])) == {1, 2, 3, 4} - trained
    assert join_params(*parts) == TREE


def test_patterns_that_fit_nothing_or_everything_are_refused():
    with pytest.raises(ConfigError, match=r"fine_tuning\.freeze: 'absent' .* core/mlp/down, core/"):
        trained_mask(TREE, FineTuningConfig(freeze=("head", "absent")))
    with pytest.raises(ConfigError, match=r"fine_tuning\.train_only: 'absent' matches no"):
        trained_mask(TREE, FineTuningConfig(train_only=("absent",)))
    with pytest.raises(ConfigError, match=r"freezes every parameter"):
        trained_mask(TREE, FineTuningConfig(freeze=("",)))


@pytest.fixture(scope="module")
def trained():
    """Three steps with weight decay of all but the core's feed-forward layer frozen."""
    config = run_config(FineTuningConfig(train_only=("^core/layers/.*/mlp/",)), ema_decay=0.9)
    model, optimizer, state = start(config)
    step = jax.jit(make_train_step(model, optimizer, config))
    first, metrics = step(state, example_batch())
    after = step(step(first, example_batch())[0], example_batch())[0]
    return config, state, first, after, metrics


def test_frozen_parameters_are_bit_equal_after_training(trained):
    _, before, _, after, _ = trained

    def compare(path, old, new):
        is_same = np.asarray(old).tobytes() == np.asarray(new).tobytes()
        assert is_same == ("core/layers/layer_0/mlp/" not in path), path

    names = map_named(lambda path, _: path, before.params)
    jax.tree.map(compare, names, before.params, after.params)


def test_frozen_parameters_have_no_moments(trained):
    _, state, _, _, _ = trained
    sizes = sorted(leaf.size for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim)
    mlp = state.params["core"]["layers"]["layer_0"]["mlp"]
    # Two moments and the average of each of the two matrices.
    assert sizes == sorted(3 * [leaf.size for leaf in jax.tree.leaves(mlp)])


def test_the_norm_counts_trained_parameters_alone(trained):
    """AdamW's first moment after one unclipped step is (1 - beta1) times the gradient."""
    config, _, first, _, metrics = trained
    moments = optax.tree_utils.tree_get(first.opt_state, "mu")
    norm = optax.tree.norm(moments) / (1 - config.optimizer.beta1)
    np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-5)
    assert norm > 0


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_takes_a_tree_without_its_frozen_leaves(trained, name):
    config, state, _, _, _ = trained
    options = OptimizerConfig(name=name, warmup_steps=0, schedule="constant")
    optimizer = build_optimizer(options, 10, None)
    part, _ = split_params(state.params, config.fine_tuning)
    updates, opt_state = jax.eval_shape(lambda p: optimizer.update(p, optimizer.init(p), p), part)
    assert jax.tree.map(jnp.shape, updates) == jax.tree.map(jnp.shape, part)
    arrays = [leaf for leaf in jax.tree.leaves(opt_state) if leaf.ndim]
    assert sum(leaf.size for leaf in arrays) <= 2 * sum(leaf.size for leaf in jax.tree.leaves(part))


def test_an_average_of_weights_has_the_frozen_ones_as_they_are(trained):
    config, before, _, after, _ = trained
    params = evaluation_params(after, config)
    assert jax.tree.structure(params) == jax.tree.structure(after.params)
    np.testing.assert_array_equal(
        params["embedding"]["embedding"], before.params["embedding"]["embedding"]
    )
    ours, last = (tree["core"]["layers"]["layer_0"]["mlp"]["up"] for tree in (params, after.params))
    assert float(jnp.max(jnp.abs(ours - last))) > 1e-4


def test_lora_trains_the_exit_gate_itself():
    """It is vectors, which have no updates: a fresh one would stay as it starts."""
    base = {"down": 1.0, "exit_gate": {"weight": 2.0, "norm": {"scale": 3.0}}}
    kept = {"base": base, "lora": {"down": {"a": 4.0, "b": 5.0}}}
    parts = split_params(kept, LORA)
    assert set(jax.tree.leaves(parts[0])) == {2, 3, 4, 5}
    assert join_params(*parts) == kept


def test_muon_needs_a_matrix_that_is_trained():
    optimizer = build_optimizer(OptimizerConfig(name="muon", warmup_steps=0), 10)
    part, _ = split_params(
        {"up": jnp.ones((4, 2, 4)), "norm": {"scale": jnp.ones(4)}},
        FineTuningConfig(train_only=("scale",)),
    )
    with pytest.raises(ConfigError, match=r"optimizer\.name: 'muon' acts on none .* 'adamw'"):
        optimizer.init(part)
    optimizer.init({"up": jnp.ones((4, 2, 4)), "norm": {"scale": None}})


def test_what_lora_adds_is_evaluated():
    config = run_config(LORA)
    base = {"down": jnp.ones((6, 8)), "scale": jnp.ones(8)}
    update = {"a": jnp.arange(12.0).reshape(6, 2), "b": jnp.full((2, 8), 0.5)}
    kept = {"base": base, "lora": {"down": update}}
    assert set(jax.tree.leaves(trained_mask(kept, config.fine_tuning)["base"])) == {False}
    state = TrainState(None, kept, None, None, None, None)
    merged = evaluation_params(state, config)
    added = 16 / 2 * np.arange(12.0).reshape(6, 2) @ np.full((2, 8), 0.5)
    np.testing.assert_allclose(merged["down"], 1 + added)
    np.testing.assert_array_equal(merged["scale"], base["scale"])


def test_an_autoencoder_within_the_model_is_never_trained():
    tree = {"media": {"image_decoder": {"image_vae": {"encoder": 1.0}, "decoder": 2.0}}}
    for tuning in (FineTuningConfig(), FineTuningConfig(train_only=("media",))):
        trained, frozen = split_params(tree, tuning)
        assert jax.tree.leaves(trained) == [2.0]
        assert frozen["media"]["image_decoder"]["image_vae"] == {"encoder": 1.0}
