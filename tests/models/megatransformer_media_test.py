"""The model with images and sound: what may depend on what, and what must not."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_media_model import CONFIG, LENGTH, tiny_media_batch, tiny_media_model

from megatransformer_jax.models.media.coda import Coda
from megatransformer_jax.models.media.parts import sequence_room
from megatransformer_jax.models.megatransformer import init_params, param_axes
from megatransformer_jax.types import MediaBatch

DEPTH = 2
# Rows of the batch: text places of what its two rows hold.
IMAGE_AT, CLIP_AT = 1, 4


@pytest.fixture(scope="module")
def parts():
    model = tiny_media_model()

    @jax.jit
    def noisy_params(key):
        """Zero-initialised weights would hide what they are to show."""
        params = init_params(model, key)
        return jax.tree.map(
            lambda leaf: leaf + 0.1 * jax.random.normal(jax.random.key(leaf.size), leaf.shape),
            params,
        )

    return model, noisy_params(jax.random.key(0))


@pytest.fixture(scope="module")
def run(parts):
    model, params = parts

    @jax.jit
    def run(batch):
        return model.apply(
            {"params": params},
            batch.tokens,
            segment_ids=batch.segment_ids,
            num_steps=DEPTH,
            media=batch.media,
        )

    return run


def changed(batch, **arrays):
    """The batch with other media."""
    return batch._replace(media=batch.media._replace(**arrays))


def assert_conditions_equal(one, other, rows):
    for kind in ("image", "audio"):
        np.testing.assert_array_equal(
            one.conditions[kind].context[rows], other.conditions[kind].context[rows]
        )


def test_every_parameter_has_axes(parts):
    model, params = parts
    assert jax.tree.structure(params) == jax.tree.structure(
        param_axes(model), is_leaf=lambda node: isinstance(node, tuple)
    )


def test_a_batch_without_media_is_text(run, parts):
    model, params = parts
    batch = tiny_media_batch()
    media = MediaBatch(
        jnp.zeros_like(batch.media.follows),
        images=batch.media.images,
        is_image=jnp.zeros_like(batch.media.is_image),
        is_drawn=batch.media.is_drawn,
        mels=batch.media.mels,
        mel_lengths=jnp.zeros_like(batch.media.mel_lengths),
        is_spoken=batch.media.is_spoken,
    )
    output = run(batch._replace(media=media))
    text = jax.jit(
        lambda tokens, ids: model.apply(
            {"params": params}, tokens, segment_ids=ids, num_steps=DEPTH
        )
    )(batch.tokens, batch.segment_ids)
    is_text = np.asarray(batch.segment_ids) > 0
    np.testing.assert_allclose(output.logits[is_text], text.logits[is_text], atol=1e-5)
    assert not np.any(output.conditions["image"].is_context)


def test_what_comes_later_changes_nothing_before(run):
    batch = tiny_media_batch()
    before = run(batch)
    after = run(changed(batch, images=batch.media.images.at[0, 0].add(0.5)))
    np.testing.assert_array_equal(before.logits[0, : IMAGE_AT + 1], after.logits[0, : IMAGE_AT + 1])
    assert np.all(np.any(before.logits[0, IMAGE_AT + 1 : 7] != after.logits[0, IMAGE_AT + 1 : 7]))
    # Its own condition and the other row's know nothing of it; that of the clip behind it does.
    np.testing.assert_array_equal(
        before.conditions["image"].context, after.conditions["image"].context
    )
    assert np.any(before.conditions["audio"].context[0] != after.conditions["audio"].context[0])
    np.testing.assert_array_equal(before.logits[1], after.logits[1])


def test_text_before_a_medium_is_its_condition(run):
    batch = tiny_media_batch()
    before, after = run(batch), run(batch._replace(tokens=batch.tokens.at[0, 0].set(3)))
    first = before.conditions["image"]
    assert np.any(first.context[0] != after.conditions["image"].context[0])
    # The window of 3 has two places, the first token and the opening one.
    np.testing.assert_array_equal(first.is_context[0], [False, True, True])
    np.testing.assert_array_equal(first.context[0, 0], jnp.zeros(CONFIG.width))
    assert not np.any(first.is_context[1])  # The unused slot of row 0.


def test_padding_and_unused_slots_change_nothing(run):
    batch = tiny_media_batch()
    media = batch.media
    spoiled = changed(
        batch._replace(tokens=jnp.where(batch.segment_ids > 0, batch.tokens, 7)),
        images=jnp.where(media.is_image[..., None, None, None], media.images, 9.0),
        mels=jnp.where(
            jnp.arange(media.mels.shape[2])[:, None] < media.mel_lengths[..., None, None],
            media.mels,
            9.0,
        ),
    )
    one, other = run(batch), run(spoiled)
    is_text = np.asarray(batch.segment_ids) > 0
    np.testing.assert_array_equal(one.logits[is_text], other.logits[is_text])
    assert_conditions_equal(one, other, slice(None))


def test_media_are_taken_in_order(run):
    batch = tiny_media_batch()
    swapped = run(changed(batch, images=batch.media.images[:, ::-1]))
    plain = run(batch)
    # Row 1 has its images at 2 and 3: what is before both stays, what is behind the first differs.
    np.testing.assert_array_equal(plain.logits[1, :3], swapped.logits[1, :3])
    assert np.any(plain.logits[1, 3] != swapped.logits[1, 3])


def test_gradients_reach_every_part(parts):
    model, params = parts
    batch = tiny_media_batch()

    def loss(params):
        output = model.apply(
            {"params": params},
            batch.tokens,
            segment_ids=batch.segment_ids,
            num_steps=DEPTH,
            backprop_depth=DEPTH,
            media=batch.media,
        )
        images = batch.media.images.reshape(-1, *CONFIG.image.shape)
        mels = batch.media.mels.reshape(-1, *batch.media.mels.shape[2:])
        key = jax.random.key(3)
        drawn = model.apply(
            {"params": params}, images, output.conditions["image"], key, method="image_loss"
        )
        spoken = model.apply(
            {"params": params},
            mels,
            jnp.maximum(batch.media.mel_lengths.reshape(-1), 1),
            output.conditions["audio"],
            key,
            method="audio_loss",
        )
        text = jnp.mean(jnp.square(output.logits))
        return text + jnp.sum(drawn["loss"]) + jnp.sum(spoken["loss"])

    gradients = jax.jit(jax.grad(loss))(params)
    still = [
        jax.tree_util.keystr(path)
        for path, leaf in jax.tree_util.tree_leaves_with_path(gradients)
        if not np.any(leaf)
    ]
    assert still == []


def test_empty_slots_are_skipped_without_effect(parts):
    """Of 20 slots of either kind 5 to 15 are in use."""
    model, params = parts
    batch = tiny_media_batch(10)

    def loss(params, fills_slots):
        output = model.apply(
            {"params": params},
            batch.tokens,
            segment_ids=batch.segment_ids,
            num_steps=1,
            backprop_depth=1,
            media=batch.media,
            fills_slots=fills_slots,
        )
        is_text = batch.segment_ids[..., None] > 0
        return jnp.sum(jnp.where(is_text, output.logits, 0) ** 2)

    differentiate = jax.jit(jax.value_and_grad(loss), static_argnums=1)
    (one, first), (other, second) = (differentiate(params, fills) for fills in (False, True))
    np.testing.assert_allclose(one, other, rtol=1e-6)
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4 * np.max(np.abs(b)))


def test_codas_follow_their_protocol(parts):
    model, params = parts
    bound = model.bind({"params": params})
    assert isinstance(bound.media.image_coda, Coda)
    rng = np.random.default_rng(0)
    latents = jnp.asarray(rng.normal(size=(2, 3, CONFIG.width)), jnp.float32)
    exists = jnp.array([[False, True, True], [False, False, False]])
    for coda in (bound.media.image_coda, bound.media.audio_coda):
        condition = coda(latents, exists, True)
        spoiled = coda(jnp.where(exists[..., None], latents, 5.0), exists, True)
        np.testing.assert_array_equal(condition.context, spoiled.context)
        np.testing.assert_array_equal(condition.is_context, exists)
        assert np.all(condition.context[1] == 0) and np.all(np.isfinite(condition.context))


def test_sequences_have_room_for_all_slots(run):
    batch = tiny_media_batch()
    room = sequence_room(CONFIG, batch.media)
    assert room == 2 * 4 + 2 * 2
    assert run(batch).latent.shape[1] == LENGTH + room


def test_wrong_media_are_named(parts):
    model, params = parts
    batch = tiny_media_batch()

    def apply(**arrays):
        media = batch.media._replace(**arrays)
        model.apply({"params": params}, batch.tokens, num_steps=1, media=media)

    with pytest.raises(ValueError, match=r"image slots have shape \(8, 8, 1\).*takes \(4, 4, 1\)"):
        apply(images=jnp.zeros((2, 2, 8, 8, 1)))
    with pytest.raises(ValueError, match=r"image.enabled=True, and the batch has no image slots"):
        apply(images=None)
    plain = tiny_media_model(dataclasses.replace(CONFIG, audio=type(CONFIG.audio)()))
    with pytest.raises(ValueError, match=r"audio.enabled=False, and the batch has audio slots"):
        plain.apply({"params": params}, batch.tokens, num_steps=1, media=batch.media)
