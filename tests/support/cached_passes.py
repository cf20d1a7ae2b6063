"""Tiny models and passes with a cache, for the tests of cached forward passes."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from megatransformer_jax.config.layers import AttentionConfig
from megatransformer_jax.config.model import ModelConfig
from megatransformer_jax.config.recurrence import RecurrenceConfig
from megatransformer_jax.models.exit_criteria import DepthRule, exit_criterion
from megatransformer_jax.models.megatransformer import build_model, init_params
from megatransformer_jax.models.passes.cached import NewTokens, cached_forward
from megatransformer_jax.nn.kv_cache import CacheShape, init_cache
from megatransformer_jax.sharding.rules import Sharder
from megatransformer_jax.types import DTypePolicy

VOCAB_SIZE = 32
# Far less than on any platform, so that a few rows are several blocks.
BLOCK_ROWS = 4
TINY = ModelConfig(
    vocab_size=VOCAB_SIZE,
    width=16,
    max_length=32,
    attention=AttentionConfig(num_heads=4),
    mlp=dataclasses.replace(ModelConfig().mlp, hidden_width=24),
    recurrence=RecurrenceConfig(mean_steps=3, backprop_depth=2, state_init="zero"),
)


def tiny(**changes):
    """TINY with changes to its sections, such as attention={'window': 3}."""
    values = {
        name: dataclasses.replace(getattr(TINY, name), **value)
        if isinstance(value, dict)
        else value
        for name, value in changes.items()
    }
    return dataclasses.replace(TINY, **values)


def make(config, *, seed=0, policy=None):
    """A model and parameters of its shapes that are all random, so that a mix-up shows."""
    model = build_model(config, policy or DTypePolicy(), Sharder(), "cpu")
    shapes = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
    rng = np.random.default_rng(seed)

    def draw(path, shape):
        # Sizes for which tokens come to rest, but each after another number of iterations.
        name = path[-1].key
        center = 1.0 if name.endswith("scale") else 0.0
        std = 1.0 if name.endswith("embedding") else 0.1 if len(shape.shape) == 1 else 0.2
        return jnp.asarray(center + std * rng.normal(size=shape.shape), shape.dtype)

    return model, jax.tree_util.tree_map_with_path(draw, shapes)


def rule(depth, criterion="fixed", threshold=0.0, min_depth=1):
    """A depth rule from Python numbers or lists of them."""
    return DepthRule(
        jnp.asarray(depth, jnp.int32),
        jnp.asarray(threshold, jnp.float32),
        jnp.asarray(min_depth, jnp.int32),
        exit_criterion(criterion),
    )


def empty_cache(config, batch_size, *, capacity=32, num_slots, dtype=jnp.float32, **options):
    """A cache of small blocks."""
    cache = init_cache(
        config,
        CacheShape(
            batch_size,
            capacity,
            num_slots=num_slots,
            dtype=jnp.dtype(dtype),
            platform="cpu",
            **options,
        ),
    )
    return cache.replace(block_rows=BLOCK_ROWS)


@functools.partial(jax.jit, static_argnames=("model", "is_first"))
def step(model, params, tokens, is_token, cache, rule, is_first=False, keys=None):
    """One pass, compiled."""
    new = NewTokens(tokens, is_token, state_keys=keys, is_first=is_first)
    return cached_forward(model, params, new, cache, rule)


def in_passes(model, params, tokens, is_token, cache, rule, sizes, *, begins=False, keys=None):
    """Logits, steps and cache after passes of these sizes.

    `begins` tells the first one that the cache is empty.
    """
    logits, steps, start = [], [], 0
    for size in sizes:
        rows = slice(start, start + size)
        is_first = begins and start == 0
        out = step(model, params, tokens[:, rows], is_token[:, rows], cache, rule, is_first, keys)
        cache, start = out.cache, start + size
        logits.append(out.logits)
        steps.append(out.num_steps)
    assert start == tokens.shape[1]
    return np.concatenate(logits, 1), np.concatenate(steps, 1), cache


def some_tokens(batch_size, length, seed=0):
    """Random token ids."""
    tokens = np.random.default_rng(seed).integers(0, VOCAB_SIZE, (batch_size, length))
    return jnp.asarray(tokens, jnp.int32)


def layout(*rows):
    """Which columns hold tokens, bool [B, T], from strings such as '..xx xxx x..'; blanks part
    passes."""
    marks = [row.replace(" ", "") for row in rows]
    return jnp.asarray([[mark == "x" for mark in row] for row in marks])


def spread(tokens, is_token):
    """Each row's tokens put where `is_token` says; padding is a real token's id."""
    spread = np.full(is_token.shape, VOCAB_SIZE - 1, np.int32)
    for row, where in enumerate(np.asarray(is_token)):
        spread[row, where] = tokens[row, : where.sum()]
    return jnp.asarray(spread)
