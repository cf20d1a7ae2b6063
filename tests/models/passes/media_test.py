"""Passes with a cache over text and media against full recomputation."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cached_passes import empty_cache, make, rule
from tiny_media_model import CONFIG, tiny_media_batch

from megatransformer_jax.config.layers import ValueEmbeddingConfig
from megatransformer_jax.models.passes.cached import Inserted, cached_forward, token_states
from megatransformer_jax.models.passes.media import media_sequence

DEPTH, NUM_SLOTS, COLUMNS, CHUNK = 2, 4, 20, 5
LENGTHS = jnp.array([7, 6])
# Two layers of prelude, or what the second reads of media would not show.
MODEL = dataclasses.replace(
    CONFIG,
    prelude_layers=2,
    attention=dataclasses.replace(CONFIG.attention, window=4),
    positions=dataclasses.replace(CONFIG.positions, scheme="alibi"),
    recurrence=dataclasses.replace(CONFIG.recurrence, state_init="normal"),
    value_embedding=ValueEmbeddingConfig((0, 2, 3), 4),
)
KEYS = jax.random.split(jax.random.key(5), 2)


@functools.cache
def made():
    return make(MODEL)


@functools.partial(jax.jit, static_argnums=0)
def sequence_of(model, params, batch):
    return media_sequence(model, params, batch.tokens, LENGTHS, batch.media, COLUMNS)


@functools.partial(jax.jit, static_argnums=0, static_argnames=("is_first",))
def step(model, params, sequence, cache, rule, *, is_first):
    new = sequence.replace(state_keys=KEYS, is_first=is_first)
    output = cached_forward(model, params, new, cache, rule)
    return output.logits, output.num_steps, output.cache


def in_chunks(model, params, sequence, depth_rule, size):
    cache = empty_cache(model.config, 2, num_slots=NUM_SLOTS, with_media=True)
    results = []
    for start in range(0, COLUMNS, size):
        part = jax.tree.map(lambda array, at=start: array[:, at : at + size], sequence)
        *result, cache = step(model, params, part, cache, depth_rule, is_first=size == COLUMNS)
        results.append(result)
    return *(np.concatenate(arrays, axis=1) for arrays in zip(*results, strict=True)), cache


def at_text(sequence, row, logits):
    """The row's logits at its tokens, in order."""
    is_text = np.asarray(sequence.is_token & ~sequence.inserted.is_medium)[row]
    return logits[row][is_text]


@functools.partial(jax.jit, static_argnums=0)
def uncached(model, params, batch):
    def lay_out(module):
        return module.media.layout(batch.media, batch.segment_ids).positions

    positions = model.apply({"params": params}, method=lay_out)
    injected = jnp.zeros((*positions.shape, model.config.core_width))
    return model.apply(
        {"params": params},
        batch.tokens,
        segment_ids=batch.segment_ids,
        num_steps=DEPTH,
        state=token_states(model.config, KEYS, positions, injected),
        media=batch.media,
    )


def test_passes_with_media_equal_full_recomputation():
    model, params = made()
    batch = tiny_media_batch()
    sequence = sequence_of(model, params, batch)
    np.testing.assert_array_equal(sequence.is_token.sum(axis=1), [7 + 4 + 2, 6 + 2 + 4 + 4])
    wanted = np.asarray(uncached(model, params, batch).logits)
    for size in (COLUMNS, CHUNK):
        logits, steps, cache = in_chunks(model, params, sequence, rule(DEPTH), size)
        for row, length in enumerate(LENGTHS):
            np.testing.assert_allclose(
                at_text(sequence, row, logits), wanted[row, :length], atol=2e-5
            )
        np.testing.assert_array_equal(steps, np.where(sequence.is_token, DEPTH, 0))
        np.testing.assert_array_equal(cache.next_position, [13, 16])


def test_places_of_media_exit_as_tokens_do():
    model, params = made()
    sequence = sequence_of(model, params, tiny_media_batch())
    fixed, _, _ = in_chunks(model, params, sequence, rule(DEPTH), CHUNK)
    never = rule(DEPTH, "latent_diff", 0.0)
    logits, steps, _ = in_chunks(model, params, sequence, never, CHUNK)
    is_token = np.asarray(sequence.is_token)
    np.testing.assert_allclose(logits[is_token], fixed[is_token], atol=2e-5)
    _, steps, _ = in_chunks(model, params, sequence, rule(4, "latent_diff", 0.4), CHUNK)
    assert len(set(steps[np.asarray(sequence.inserted.is_medium)].tolist())) > 1


def test_the_prelude_of_text_sees_no_media():
    """Told that media are text, it reads other rows of the cache, and the result differs."""
    model, params = made()
    sequence = sequence_of(model, params, tiny_media_batch())
    *_, cache = in_chunks(model, params, sequence, rule(DEPTH), CHUNK)
    last = jax.tree.map(lambda array: array[:, -CHUNK:], sequence)
    text = dataclasses.replace(
        last, inserted=Inserted(last.inserted.values, jnp.zeros_like(last.inserted.is_medium))
    )
    seen = cache.replace(is_medium=jnp.zeros_like(cache.is_medium))
    right, *_ = step(model, params, text, cache, rule(DEPTH), is_first=False)
    wrong, *_ = step(model, params, text, seen, rule(DEPTH), is_first=False)
    assert np.max(np.abs(right[1] - wrong[1])) > 1e-3


def test_a_cache_for_text_takes_no_media():
    model, params = made()
    sequence = sequence_of(model, params, tiny_media_batch())
    cache = empty_cache(model.config, 2, num_slots=DEPTH)
    with pytest.raises(ValueError, match="made for text alone; make it with_media=True"):
        step(model, params, sequence, cache, rule(DEPTH), is_first=False)
