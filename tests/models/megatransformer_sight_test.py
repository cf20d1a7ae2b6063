"""Models whose tokens see the whole row (`attention.is_causal=False`)."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sharded_step import MESHES, example_batch, run_config

from megatransformer_jax.config.generation import GenerationConfig
from megatransformer_jax.config.layers import AttentionConfig, PositionConfig
from megatransformer_jax.config.model import MlpConfig, ModelConfig
from megatransformer_jax.config.option import ConfigError
from megatransformer_jax.config.recurrence import RecurrenceConfig
from megatransformer_jax.evaluation.log_likelihood import LogLikelihoodScorer
from megatransformer_jax.generation.generator import Generator
from megatransformer_jax.models.attention_kernels import kernel_choices
from megatransformer_jax.models.cost.flops import forward_flops
from megatransformer_jax.models.megatransformer import build_model, init_params
from megatransformer_jax.nn.kv_cache import CacheShape, init_cache
from megatransformer_jax.sharding.mesh import make_mesh, make_sharder
from megatransformer_jax.sharding.rules import Sharder
from megatransformer_jax.types import DTypePolicy

LENGTH = 6
CONFIG = ModelConfig(
    vocab_size=12,
    width=16,
    max_length=16,
    core_layers=1,
    attention=AttentionConfig(num_heads=2, is_causal=False),
    positions=PositionConfig(scheme="none"),
    mlp=MlpConfig(hidden_width=20),
    recurrence=RecurrenceConfig(state_init="zero"),
)
CAUSAL = dataclasses.replace(CONFIG, attention=AttentionConfig(num_heads=2))


@pytest.fixture(scope="module")
def run():
    model = build_model(CONFIG, DTypePolicy(), Sharder(), "cpu")
    params = init_params(model, jax.random.key(0))

    @jax.jit
    def forward(tokens, segment_ids):
        return model.apply(
            {"params": params}, tokens, segment_ids=segment_ids, num_steps=jnp.int32(3)
        ).logits

    return lambda tokens, segments: np.asarray(forward(jnp.array([tokens]), jnp.array([segments])))


def test_a_row_in_another_order_is_answered_in_that_order(run):
    """Without positions nothing tells places apart, as long as each sees all others."""
    tokens, order = np.array([3, 1, 4, 1, 5, 9]), np.array([5, 2, 0, 4, 1, 3])
    ones = np.ones(LENGTH, np.int32)
    logits = run(tokens, ones)[0]
    np.testing.assert_allclose(run(tokens[order], ones)[0], logits[order], atol=1e-5)
    changed = run([*tokens[:-1], 2], ones)[0]
    assert np.abs(changed[0] - logits[0]).max() > 1e-4


def test_padding_has_no_influence(run):
    tokens, segments = [3, 1, 4, 1, 5, 9], [1, 1, 1, 1, 0, 0]
    others = [3, 1, 4, 1, 7, 7]
    np.testing.assert_allclose(
        run(tokens, segments)[0, :4], run(others, segments)[0, :4], atol=1e-6
    )


def test_what_goes_on_from_a_prompt_is_refused():
    with pytest.raises(ConfigError, match=r"model.attention.is_causal: is False, .* evaluate"):
        init_cache(CONFIG, CacheShape(1, 8, 1, jnp.dtype("float32"), "cpu"))
    model = build_model(CONFIG, DTypePolicy(), Sharder(), "cpu")
    with pytest.raises(ConfigError, match="need a causal model"):
        LogLikelihoodScorer(model, None, depth=1, batch_size=1, max_length=8)
    with pytest.raises(ConfigError, match=r"model.attention.is_causal: is False"):
        Generator(model, None, None, GenerationConfig(), 1)


def test_all_keys_are_counted_and_kernels_know():
    extra = sum(forward_flops(CONFIG, 8).once["prelude"].values()) - sum(
        forward_flops(CAUSAL, 8).once["prelude"].values()
    )
    # Products with keys and with values: 2 * 2 * width for each key that is not behind the query.
    assert extra == pytest.approx(4 * 16 * (8 - 4.5))
    model = build_model(CONFIG, DTypePolicy(), Sharder(), "cpu")
    assert [choice.kernel for choice in kernel_choices(model, [8], is_training=True)] == ["xla"]


def test_rows_cut_over_devices_are_answered_as_on_one():
    """Keys of all devices come together again, and so do heads."""
    config = run_config().model
    config = dataclasses.replace(
        config, attention=dataclasses.replace(config.attention, is_causal=False)
    )
    alone = build_model(config, DTypePolicy(), Sharder(), "cpu")
    params, batch = init_params(alone, jax.random.key(0)), example_batch()

    def logits(model, batch):
        @jax.jit
        def forward(batch):
            return model.apply(
                {"params": params},
                batch.tokens,
                positions=batch.positions,
                segment_ids=batch.segment_ids,
                num_steps=jnp.int32(2),
                rngs={"state": jax.random.key(1)},
            ).logits

        return np.asarray(forward(batch))

    sharder = make_sharder(config, make_mesh(MESHES["keys"], jax.devices()))
    on_mesh = build_model(config, DTypePolicy(), sharder, "cpu")
    placed = jax.device_put(batch, sharder.sharding("batch", "length"))
    np.testing.assert_allclose(logits(on_mesh, placed), logits(alone, batch), atol=2e-5)
