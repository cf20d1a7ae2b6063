"""Interleaving against a plain Python reference, over random layouts and one compilation."""

import functools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st

from megatransformer_jax.ops.interleave import (
    interleave,
    interleave_layout,
    take_places,
    window_before,
)
from megatransformer_jax.types import AUDIO, IMAGE

ROWS, TOKENS, IMAGES, PATCHES, CLIPS, FRAMES, WIDTH = 3, 7, 2, 4, 2, 3, 2
LENGTH = TOKENS + IMAGES * PATCHES + CLIPS * FRAMES
COMPILATIONS = []


@st.composite
def rows(draw):
    """(segment ids, follows, image lengths, audio lengths) of one row."""
    segments, follows, images, clips = [], [], [], []
    for document in range(1, draw(st.integers(1, 3)) + 1):
        for _ in range(draw(st.integers(1, 3))):
            if len(segments) == TOKENS:
                break
            kind = draw(st.sampled_from([0, 0, IMAGE, AUDIO]))
            if kind == IMAGE and len(images) < IMAGES:
                images.append(PATCHES)
            elif kind == AUDIO and len(clips) < CLIPS:
                clips.append(draw(st.integers(1, FRAMES)))
            else:
                kind = 0
            segments.append(document)
            follows.append(kind)
    return segments, follows, images, clips


def padded(values, size):
    """Zeros behind."""
    return [*values, *[0] * (size - len(values))]


def reference(row, text, images, clips):
    """The sequence of one row, and where each of its parts is, by plain loops."""
    segments, follows, image_lengths, clip_lengths = row
    sequence, documents, places, openings = [], [], [], {IMAGE: [], AUDIO: []}
    lengths, streams = {IMAGE: image_lengths, AUDIO: clip_lengths}, {IMAGE: images, AUDIO: clips}
    for token, (document, kind) in enumerate(zip(segments, follows, strict=True)):
        places.append(len(sequence))
        sequence.append(text[token])
        documents.append(document)
        if kind:
            slot = len(openings[kind])
            openings[kind].append(len(sequence) - 1)
            for index in range(lengths[kind][slot]):
                sequence.append(streams[kind][slot][index])
                documents.append(document)
    positions = [index - documents.index(document) for index, document in enumerate(documents)]
    filler = [np.zeros(WIDTH)] * (LENGTH - len(sequence))
    return (
        np.array([*sequence, *filler]),
        padded(documents, LENGTH),
        padded(positions, LENGTH),
        places,
        openings,
    )


@jax.jit
def run(segments, follows, image_lengths, clip_lengths, text, images, clips):
    """All at once, and once compiled."""
    COMPILATIONS.append(1)
    layout = interleave_layout(follows, segments, image_lengths, clip_lengths, PATCHES, FRAMES)
    sequence = interleave(layout, text, images, clips)
    window = window_before(layout, sequence, layout.image_openings, 3)
    places = (layout.text_places, layout.image_places, layout.audio_places)
    return layout, sequence, tuple(take_places(sequence, each) for each in places), window


@functools.cache
def values():
    """Text, images and clips, all different and none zero."""
    shapes = ((ROWS, TOKENS), (ROWS, IMAGES, PATCHES), (ROWS, CLIPS, FRAMES))
    sizes = [int(np.prod(shape)) * WIDTH for shape in shapes]
    numbers = np.split(np.arange(1, sum(sizes) + 1, dtype=np.float32), np.cumsum(sizes)[:-1])
    return [part.reshape(*shape, WIDTH) for part, shape in zip(numbers, shapes, strict=True)]


def arrays(batch):
    """The rows as int32 arrays."""
    sizes = (TOKENS, TOKENS, IMAGES, CLIPS)
    return [
        jnp.array([padded(row[part], size) for row in batch], jnp.int32)
        for part, size in enumerate(sizes)
    ]


@hypothesis.settings(max_examples=60, deadline=None)
@hypothesis.given(st.lists(rows(), min_size=ROWS, max_size=ROWS))
def test_equals_a_plain_loop_and_comes_back_exactly(batch):
    text, images, clips = values()
    layout, sequence, parts, (window, exists) = run(*arrays(batch), text, images, clips)
    for index, row in enumerate(batch):
        wanted, documents, positions, places, openings = reference(
            row, text[index], images[index], clips[index]
        )
        np.testing.assert_array_equal(sequence[index], wanted)
        np.testing.assert_array_equal(layout.segment_ids[index], documents)
        np.testing.assert_array_equal(layout.positions[index], positions)
        np.testing.assert_array_equal(layout.text_places[index, : len(places)], places)
        assert np.all(layout.text_places[index, len(places) :] == LENGTH)
        is_text = np.isin(np.arange(LENGTH), places)
        filled = np.array(documents) > 0
        np.testing.assert_array_equal(layout.is_medium[index], filled & ~is_text)
        back_text, back_images, back_clips = (part[index] for part in parts)
        np.testing.assert_array_equal(back_text[: len(places)], text[index, : len(places)])
        assert np.all(back_text[len(places) :] == 0)
        for slot, length in enumerate(padded(row[2], IMAGES)):
            np.testing.assert_array_equal(back_images[slot, :length], images[index, slot, :length])
            assert np.all(back_images[slot, length:] == 0)
        for slot, length in enumerate(padded(row[3], CLIPS)):
            np.testing.assert_array_equal(back_clips[slot, :length], clips[index, slot, :length])
            assert np.all(back_clips[slot, length:] == 0)
        for slot, opening in enumerate(openings[IMAGE]):
            for offset in range(3):
                place = opening - 2 + offset
                same = place >= 0 and documents[place] == documents[opening]
                assert bool(exists[index, slot, offset]) == same
                expected = wanted[place] if same else np.zeros(WIDTH)
                np.testing.assert_array_equal(window[index, slot, offset], expected)
        assert not np.any(exists[index, len(openings[IMAGE]) :])
    assert len(COMPILATIONS) == 1


def test_unread_values_never_change_the_sequence():
    batch = [([1, 1], [IMAGE, AUDIO], [PATCHES], [2])] * ROWS
    text, images, clips = values()
    layout, sequence, _, _ = run(*arrays(batch), text, images, clips)
    spoiled_text, spoiled_images, spoiled_clips = text.copy(), images.copy(), clips.copy()
    spoiled_text[:, 2:], spoiled_images[:, 1], spoiled_clips[:, 0, 2:] = np.nan, np.nan, np.nan
    spoiled_clips[:, 1] = np.nan
    spoiled = interleave(layout, *map(jnp.asarray, (spoiled_text, spoiled_images, spoiled_clips)))
    np.testing.assert_array_equal(spoiled, sequence)


def test_without_slots_the_sequence_is_the_text():
    segments = jnp.array([[1, 1, 2, 0]])
    nothing = jnp.zeros((1, 0), jnp.int32)
    layout = interleave_layout(jnp.zeros_like(segments), segments, nothing, nothing, 0, 0)
    text = jnp.arange(8.0).reshape(1, 4, 2)
    np.testing.assert_array_equal(interleave(layout, text)[0, :3], text[0, :3])
    np.testing.assert_array_equal(layout.positions, [[0, 1, 0, 0]])
    np.testing.assert_array_equal(layout.segment_ids, segments)


def test_places_outside_are_zero():
    sequence = jnp.arange(1.0, 4.0)[None]
    np.testing.assert_array_equal(take_places(sequence, jnp.array([[-1, 0, 3]])), [[0, 1, 0]])
