"""First states: their moments, and which need randomness."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from megatransformer_jax.config.model import ModelConfig
from megatransformer_jax.config.recurrence import RecurrenceConfig
from megatransformer_jax.models.core import initial_state
from megatransformer_jax.nn.parameters import weight_init

WIDTH = 64
# A normal variable cut at three standard deviations keeps this share of its standard deviation.
CUT_STD = 0.98658


def first_state(state_init, dtype=jnp.float32, **model):
    recurrence = RecurrenceConfig(state_init=state_init)
    config = ModelConfig(width=WIDTH, recurrence=recurrence, **model)
    injected = jnp.full((8, 32, WIDTH), 0.5, dtype)
    return config, np.asarray(initial_state(config, jax.random.key(0), injected), np.float64)


@pytest.mark.parametrize(
    ("state_init", "std"), [("normal", 1.0), ("embed", WIDTH**-0.5), ("unit", 1.0)]
)
def test_standard_deviation(state_init, std):
    _, state = first_state(state_init)
    assert state.std() == pytest.approx(std, rel=0.03)
    assert abs(state.mean()) < 0.03 * std


def test_unit_is_normalised_at_every_position():
    _, state = first_state("unit")
    np.testing.assert_allclose(state.mean(-1), 0, atol=1e-6)
    np.testing.assert_allclose(state.std(-1), 1, rtol=1e-5)


@pytest.mark.parametrize("scale_embeddings", [False, True])
def test_like_init_has_the_embeddings_spread_and_is_cut(scale_embeddings):
    config, state = first_state("like_init", scale_embeddings=scale_embeddings)
    scale = WIDTH**0.5 if scale_embeddings else 1.0
    std = weight_init(config, WIDTH).embedding_std * scale
    assert state.std() == pytest.approx(std * CUT_STD, rel=0.03)
    assert np.abs(state).max() <= 3 * std * (1 + 1e-6)


def test_zero_and_none_need_no_key():
    injected = jnp.ones((1, 2, WIDTH))
    config = ModelConfig(width=WIDTH, recurrence=RecurrenceConfig(state_init="zero"))
    assert not np.any(initial_state(config, None, injected))
    config = dataclasses.replace(config, recurrence=RecurrenceConfig(state_init="none"))
    np.testing.assert_array_equal(initial_state(config, None, injected), injected)


@pytest.mark.parametrize("state_init", ["like_init", "normal", "embed", "unit", "zero", "none"])
def test_type_follows_the_injection(state_init):
    config = ModelConfig(width=WIDTH, recurrence=RecurrenceConfig(state_init=state_init))
    injected = jnp.ones((1, 2, WIDTH), jnp.bfloat16)
    assert initial_state(config, jax.random.key(0), injected).dtype == jnp.bfloat16
