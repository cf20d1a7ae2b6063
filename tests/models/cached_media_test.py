"""Passes with a cache over text and media against full recomputation."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cached_passes import empty_cache, make, rule
from tiny_media_model import CONFIG, tiny_media_batch

from megatransformer_jax.models.cached_forward import Inserted, cached_forward, token_states
from megatransformer_jax.models.media_sequence import (
    media_conditions,
    media_sequence,
    medium_of_slot,
    opened_medium,
)
from megatransformer_jax.types import AUDIO, IMAGE

DEPTH, COLUMNS, CHUNK = 2, 20, 5
LENGTHS = jnp.array([7, 6])
CONFIGS = {
    "rotary_drawn_states": dataclasses.replace(
        CONFIG, recurrence=dataclasses.replace(CONFIG.recurrence, state_init="normal")
    ),
    "alibi_window": dataclasses.replace(
        CONFIG,
        prelude_layers=2,
        attention=dataclasses.replace(CONFIG.attention, window=4),
        positions=dataclasses.replace(CONFIG.positions, scheme="alibi"),
    ),
}
KEYS = jax.random.split(jax.random.key(5), 2)


@functools.cache
def made(name):
    return make(CONFIGS[name])


@functools.partial(jax.jit, static_argnums=0)
def sequence_of(model, params, batch):
    return media_sequence(model, params, batch.tokens, LENGTHS, batch.media, COLUMNS)


@functools.partial(jax.jit, static_argnums=0, static_argnames=("is_first",))
def step(model, params, sequence, cache, rule, *, is_first):
    output = cached_forward(
        model,
        params,
        sequence.tokens,
        sequence.is_token,
        cache,
        rule,
        state_keys=KEYS,
        is_first=is_first,
        inserted=sequence.inserted,
    )
    return output.logits, output.num_steps, output.cache


def in_chunks(model, params, sequence, depth_rule, size, num_slots=DEPTH, is_first=True):
    cache = empty_cache(model.config, 2, num_slots=num_slots, with_media=True)
    results = []
    for start in range(0, COLUMNS, size):
        part = jax.tree.map(lambda array, at=start: array[:, at : at + size], sequence)
        *result, cache = step(
            model, params, part, cache, depth_rule, is_first=is_first and start == 0
        )
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


@pytest.mark.parametrize("name", CONFIGS)
def test_passes_with_media_equal_full_recomputation(name):
    model, params = made(name)
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


def test_exits_do_not_depend_on_chunks():
    model, params = made("rotary_drawn_states")
    sequence = sequence_of(model, params, tiny_media_batch())
    depth_rule = rule(6, "latent_diff", 0.3)
    options = {"num_slots": 6, "is_first": False}
    whole = in_chunks(model, params, sequence, depth_rule, COLUMNS, **options)
    parts = in_chunks(model, params, sequence, depth_rule, CHUNK, **options)
    assert len(set(whole[1][np.asarray(sequence.inserted.is_medium)].tolist())) > 1
    np.testing.assert_array_equal(whole[1], parts[1])
    is_token = np.asarray(sequence.is_token)
    np.testing.assert_allclose(whole[0][is_token], parts[0][is_token], atol=2e-5)


def test_the_prelude_of_text_sees_no_media():
    """Told that media are text, it reads other rows of the cache, and the result differs."""
    model, params = made("alibi_window")
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


def test_a_medium_behind_its_opening_token_is_what_a_whole_pass_has_there():
    model, params = made("rotary_drawn_states")
    batch = tiny_media_batch()
    sequence = sequence_of(model, params, batch)
    media = batch.media
    single = media._replace(
        follows=jnp.array([[AUDIO], [IMAGE]]),
        images=media.images[:, 1:],
        is_image=jnp.array([[False], [True]]),
        mels=media.mels[:, :1],
        mel_lengths=jnp.where(jnp.array([[True], [False]]), media.mel_lengths[:, :1], 0),
    )
    opening = jnp.array([batch.tokens[0, 4], batch.tokens[1, 3]])
    opened = jax.jit(opened_medium, static_argnums=0)(
        model, params, opening, jnp.array([True, False]), single
    )
    assert opened.tokens.shape == (2, 1 + 4)
    np.testing.assert_array_equal(opened.is_token, [[0, 0, 1, 1, 1], [0, 0, 0, 0, 0]])
    # Row 0 ends with its clip and two tokens.
    np.testing.assert_array_equal(opened.tokens[0, 2:], sequence.tokens[0, -5:-2])
    np.testing.assert_allclose(
        opened.inserted.values[0, 3:], sequence.inserted.values[0, -4:-2], atol=1e-6
    )


def test_conditions_of_a_medium_to_be_made_are_those_of_training():
    model, params = made("rotary_drawn_states")
    batch = tiny_media_batch()
    trained = uncached(model, params, batch).conditions
    # Row 0 is about to hear its clip, row 1 to see its second image.
    unmade = batch.media._replace(
        is_image=jnp.array([[True, False], [True, False]]),
        mel_lengths=batch.media.mel_lengths.at[0, 0].set(0),
    )
    conditions = jax.jit(media_conditions, static_argnums=0)(
        model, params, batch.tokens, jnp.array([5, 4]), unmade, jnp.int32(DEPTH), KEYS
    )
    for kind, row, slot in (("audio", 0, 0), ("image", 1, 1)):
        slots = jnp.full((2,), slot)
        made_now = medium_of_slot(conditions[kind], slots)
        wanted = medium_of_slot(trained[kind], slots)
        np.testing.assert_allclose(made_now.context[row], wanted.context[row], atol=2e-5)
        np.testing.assert_array_equal(made_now.is_context[row], wanted.is_context[row])
        assert np.any(made_now.is_context[row])


def test_a_cache_for_text_takes_no_media():
    model, params = made("alibi_window")
    sequence = sequence_of(model, params, tiny_media_batch())
    cache = empty_cache(model.config, 2, num_slots=DEPTH)
    with pytest.raises(ValueError, match="made for text alone; make it with_media=True"):
        step(model, params, sequence, cache, rule(DEPTH), is_first=False)
