"""A round of the parallel sampler against ordinary passes, where both mean the same."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from megatransformer_jax.config.layers import AttentionConfig, ValueEmbeddingConfig
from megatransformer_jax.config.model import ModelConfig
from megatransformer_jax.config.recurrence import RecurrenceConfig
from megatransformer_jax.models.exit_criteria import DepthRule, exit_criterion
from megatransformer_jax.models.megatransformer import build_model, init_params
from megatransformer_jax.models.passes.cached import NewTokens, cached_forward, token_states
from megatransformer_jax.models.passes.wavefront import Columns, refine
from megatransformer_jax.nn.cache_rows import write_staggered_rows
from megatransformer_jax.nn.kv_cache import CacheShape, init_cache
from megatransformer_jax.sharding.rules import Sharder
from megatransformer_jax.types import DTypePolicy

TINY = ModelConfig(
    vocab_size=32,
    width=16,
    max_length=32,
    attention=AttentionConfig(num_heads=4),
    mlp=dataclasses.replace(ModelConfig().mlp, hidden_width=24),
    recurrence=RecurrenceConfig(mean_steps=3, backprop_depth=2, state_init="normal"),
)
CONFIGS = {
    "rotary": TINY,
    "window_alibi_grouped": dataclasses.replace(
        TINY,
        attention=AttentionConfig(num_heads=4, num_kv_heads=2, window=4),
        value_embedding=ValueEmbeddingConfig((1, 2, 3), 5),
        positions=dataclasses.replace(TINY.positions, scheme="alibi"),
    ),
    "learned_no_outer_layers": dataclasses.replace(
        TINY,
        prelude_layers=0,
        coda_layers=0,
        positions=dataclasses.replace(TINY.positions, scheme="learned"),
    ),
    "other_core_width": dataclasses.replace(
        TINY,
        core_layers=1,
        recurrence=dataclasses.replace(
            TINY.recurrence,
            core_width=8,
            iteration_norm=True,
            loop_embedding=True,
            loop_scale=True,
            loop_lora_rank=2,
            hyper_connections=2,
            loop_iterations=4,
        ),
    ),
}
B, PREFIX, W = 2, 5, 4
KEYS = jax.random.split(jax.random.key(3), B)
TOKENS = jax.random.randint(jax.random.key(1), (B, PREFIX + W), 0, 32)
# The second text is padded on the left.
IS_TOKEN = jnp.asarray([[True] * PREFIX, [False] * 2 + [True] * (PREFIX - 2)])


@functools.cache
def make(name):
    model = build_model(CONFIGS[name], DTypePolicy(), Sharder(), "cpu")
    params = init_params(model, jax.random.key(0))
    rng = np.random.default_rng(0)
    return model, jax.tree.map(
        lambda leaf: leaf + rng.normal(0, 0.1, leaf.shape).astype(np.float32), params
    )


def depth_rule(depth):
    zero = jnp.float32(0)
    return DepthRule(jnp.asarray(depth, jnp.int32), zero, jnp.int32(1), exit_criterion("fixed"))


@functools.partial(jax.jit, static_argnames=("model", "is_first"))
def ordinary(model, params, tokens, is_token, cache, depth, is_first=False):
    new = NewTokens(tokens, is_token, state_keys=KEYS, is_first=is_first)
    return cached_forward(model, params, new, cache, depth_rule(depth))


@functools.partial(jax.jit, static_argnums=0)
def compiled_refine(
    model,
    params,
    tokens,
    positions,
    iterations,
    state,
    cache,
    new_column=None,
    state_keys=None,
    done=None,
):
    done = jnp.zeros_like(iterations) if done is None else done
    columns = Columns(tokens, positions, iterations, done, state, new_column)
    return refine(model, params, columns, cache, jnp.int32(0), state_keys)


def prefix(name, depth):
    model, params = make(name)
    cache = init_cache(
        model.config, CacheShape(B, 32, num_slots=1, dtype=jnp.dtype(jnp.float32), platform="cpu")
    )
    return ordinary(model, params, TOKENS[:, :PREFIX], IS_TOKEN, cache, depth, is_first=True).cache


def first_states(model, positions):
    shape = (*positions.shape, model.config.core_width)
    return token_states(model.config, KEYS, positions, jnp.zeros(shape))


def wave(cache):
    return TOKENS[:, PREFIX:], cache.next_position[:, None] + jnp.arange(W, dtype=jnp.int32)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_round_of_full_depth_equals_a_pass(name):
    """Logits, states and the cache that is left; each text at a depth of its own."""
    model, params = make(name)
    depth = jnp.asarray([3, 5], jnp.int32)
    cache = prefix(name, depth)
    tokens, positions = wave(cache)
    wanted = ordinary(model, params, tokens, jnp.ones((B, W), bool), cache, depth)
    iterations = jnp.broadcast_to(depth[:, None], (B, W))
    got, logits = compiled_refine(
        model, params, tokens, positions, iterations, first_states(model, positions), cache
    )
    np.testing.assert_allclose(logits, wanted.logits, atol=1e-5)
    np.testing.assert_allclose(got.state, wanted.state, atol=1e-5)
    written = write_staggered_rows(
        cache,
        got.rows,
        iterations,
        jnp.ones((B, W), bool),
        jnp.broadcast_to(cache.length, (B,)),
        Sharder(),
    )
    for left, right in zip(jax.tree.leaves(written), jax.tree.leaves(wanted.cache), strict=True):
        np.testing.assert_allclose(left, right, atol=1e-5)


def test_rounds_add_up():
    """Two iterations and then three are five; `change` is from round to round."""
    model, params = make("other_core_width")
    cache = prefix("other_core_width", 3)
    tokens, positions = wave(cache)
    run = functools.partial(compiled_refine, model, params, tokens, positions)
    states = [first_states(model, positions)]
    for done, count in ((0, 2), (2, 3)):
        counts, before = jnp.full((B, W), count), jnp.full((B, W), done)
        out, logits = run(counts, states[-1], cache, done=before)
        change = np.linalg.norm(out.state - states[-1], axis=-1)
        change /= np.linalg.norm(out.state, axis=-1)
        np.testing.assert_allclose(out.change, change, rtol=1e-4)
        states.append(out.state)
    at_once, logits_at_once = run(jnp.full((B, W), 5), states[0], cache)
    np.testing.assert_allclose(at_once.state, states[-1], atol=1e-5)
    np.testing.assert_allclose(logits_at_once, logits, atol=1e-4)


def test_unused_columns_and_later_ones_are_not_seen():
    model, params = make("window_alibi_grouped")
    cache = prefix("window_alibi_grouped", 3)
    tokens, positions = wave(cache)
    state = first_states(model, positions)
    run = functools.partial(compiled_refine, model, params)
    iterations = jnp.asarray([[4, 3, 1, 1], [2, 2, 2, 1]], jnp.int32)
    full, full_logits = run(tokens, positions, iterations, state, cache)
    for used in (1, 2, 3):
        is_used = jnp.arange(W) < used
        out, logits = run(
            jnp.where(is_used, tokens, 9),
            jnp.where(is_used, positions, -1),
            jnp.where(is_used, iterations, 0),
            jnp.where(is_used[:, None], state, 1e3),
            cache,
        )
        np.testing.assert_allclose(logits[:, :used], full_logits[:, :used], atol=1e-5)
        core, wanted = out.rows[1][..., :used, :], full.rows[1][..., :used, :]
        np.testing.assert_allclose(core, wanted, atol=1e-5)


@pytest.mark.parametrize("new", [[0, 2], [4, 1]])
def test_a_new_column_begins_with_its_first_state(new):
    model, params = make("rotary")
    cache = prefix("rotary", 3)
    tokens, positions = wave(cache)
    state = jax.random.normal(jax.random.key(7), (B, W, 16))
    new = jnp.asarray(new, jnp.int32)
    run = functools.partial(
        compiled_refine, model, params, tokens, positions, jnp.ones((B, W), int)
    )
    got, _ = run(state, cache, new_column=new, state_keys=KEYS)
    is_new = jnp.arange(W) == new[:, None]
    replaced = jnp.where(is_new[..., None], first_states(model, positions), state)
    wanted, _ = run(replaced, cache)
    np.testing.assert_allclose(got.state, wanted.state, atol=1e-6)
    assert np.abs(got.state - run(state, cache)[0].state).max() > 1e-3
    with pytest.raises(ValueError, match="give a key"):
        run(state, cache, new_column=new)
