"""What is shown of held-out rows: made from their own text, and answered to their own media."""

import dataclasses

import jax
import numpy as np
import pytest
from smallest_media_model import TOKENIZER, Medium, make_model, media_batch

from megatransformer_jax.config.loop import MeshConfig
from megatransformer_jax.evaluation.media.making import (
    greedy_answers,
    make_answering_step,
    make_making_step,
    make_next_tokens,
)
from megatransformer_jax.sharding.mesh import make_mesh
from megatransformer_jax.sharding.rules import Sharder
from megatransformer_jax.training.distributed import make_global_batch
from megatransformer_jax.types import AUDIO, IMAGE

STATE_KEY, DRAW_KEY = jax.random.key(0), jax.random.key(1)
STEPS = np.int32(2)
ROWS = (
    (0, ("abcdefgh",)),
    (1, (Medium(IMAGE), "ab")),
    (2, ("cd", Medium(IMAGE, is_target=True))),
    (3, (Medium(AUDIO), "c")),
    None,
    (1, (Medium(IMAGE), "xyz")),
    (2, ("e", Medium(IMAGE, is_target=True))),
    (1, (Medium(IMAGE), "q")),
)


@pytest.fixture(scope="module")
def subject():
    model, params = make_model()
    # A random first state of the core depends on a row's place in the batch.
    recurrence = dataclasses.replace(model.config.recurrence, state_init="zero")
    model = model.copy(config=dataclasses.replace(model.config, recurrence=recurrence))
    return model, params, media_batch(model, ROWS)


@pytest.fixture(scope="module")
def make(subject):
    return make_making_step(subject[0], STATE_KEY, count=3)


@pytest.fixture(scope="module")
def answer(subject):
    return make_answering_step(subject[0], STATE_KEY, count=2)


def test_media_are_made_from_the_texts_of_the_first_rows_that_ask_for_them(subject, make):
    _, params, batch = subject
    made = jax.device_get(make(params, batch, STEPS, DRAW_KEY))
    assert made["audio"].exists.tolist() == [False] * 3
    drawn = made["image"]
    assert drawn.exists.tolist() == [True, True, False]
    np.testing.assert_array_equal(drawn.tokens[:2], batch.tokens[[2, 6]])
    np.testing.assert_array_equal(drawn.real[:2], batch.media.images[[2, 6], 0])

    def drawings(**changes):
        media = batch.media._replace(images=-batch.media.images)
        changed = batch._replace(media=media, **changes)
        return jax.device_get(make(params, changed, STEPS, DRAW_KEY))["image"].media

    # The image is not seen, the text is.
    np.testing.assert_array_equal(drawings()[:2], drawn.media[:2])
    tokens = batch.tokens.copy()
    tokens[2, 1] += 1
    differs = np.abs(drawings(tokens=tokens) - drawn.media).max(axis=(1, 2, 3))
    assert differs[0] > 1e-3 and differs[1] == 0


def test_answers_are_the_greedy_ones_to_given_media(subject, answer):
    model, params, batch = subject
    answered = jax.device_get(answer(params, batch, STEPS))
    images, clips = answered["image"], answered["audio"]
    assert images.exists.tolist() == [True, True] and clips.exists.tolist() == [True, False]
    np.testing.assert_array_equal(images.media, batch.media.images[[1, 5], 0])
    np.testing.assert_array_equal(clips.media[0], batch.media.mels[3, 0])
    assert clips.lengths[0] == batch.media.mel_lengths[3, 0]

    next_tokens = jax.jit(make_next_tokens(model, STATE_KEY))
    wanted = greedy_answers(next_tokens, params, batch, STEPS, TOKENIZER.eos_id)
    for own, number in ((images, (1, 5)), (clips, (3,))):
        for index, row in enumerate(number):
            said = own.answer[index][own.is_answer[index]].tolist()
            ends = [*said, TOKENIZER.eos_id].index(TOKENIZER.eos_id)
            assert said[:ends] == wanted[row]
            counts = own.is_answer[index] & (own.loss_mask[index] > 0)
            text = "".join(part for part in ROWS[row][1] if isinstance(part, str))
            assert TOKENIZER.decode(own.targets[index][counts].tolist()) == text


def test_the_right_answer_is_not_looked_at(subject, answer):
    _, params, batch = subject
    tokens = batch.tokens.copy()
    tokens[[1, 5], 3:] = 9  # Behind the start and the two markers.
    other = jax.device_get(answer(params, batch._replace(tokens=tokens), STEPS))["image"]
    own = jax.device_get(answer(params, batch, STEPS))["image"]
    np.testing.assert_array_equal(other.answer, own.answer)


def test_a_mesh_gives_the_same(subject, answer):
    model, params, batch = subject
    sharder = Sharder(make_mesh(MeshConfig(data=2, fsdp=2, sequence=2), jax.devices()))
    meshed = make_answering_step(model.copy(sharder=sharder), STATE_KEY, count=2)
    ours = meshed(params, make_global_batch(batch, sharder), STEPS)
    assert ours["image"].answer.sharding.is_fully_replicated
    theirs = answer(params, batch, STEPS)
    for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)
