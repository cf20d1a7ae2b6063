"""Held-out rows as prompts, and what a generator makes of them, against passes without a cache."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from smallest_media_model import LENGTH, TOKENIZER, Medium, make_model, media_batch

from megatransformer_jax.config.generation import GenerationConfig
from megatransformer_jax.config.loop import MeshConfig
from megatransformer_jax.config.sampling import DepthConfig
from megatransformer_jax.evaluation.media.making import answers, rows_to_answer, rows_to_make
from megatransformer_jax.evaluation.media.validation import run_model
from megatransformer_jax.generation.generator import Generator
from megatransformer_jax.sharding.mesh import make_mesh
from megatransformer_jax.sharding.rules import Sharder
from megatransformer_jax.types import AUDIO, IMAGE

DEPTH = 2
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


def make_generator(model, params):
    return lambda config: Generator(model, params, TOKENIZER, config, DEPTH)


def test_rows_stop_where_a_medium_is_to_be_made(subject):
    _, _, batch = subject
    drawn = list(rows_to_make([batch], IMAGE, TOKENIZER))
    assert [question.text for question in drawn] == ["cd", "e"]
    opening = TOKENIZER.marker_id("<|IMAGE|>")
    assert drawn[0].prompt.ids == (TOKENIZER.bos_id, *TOKENIZER.encode("cd"), opening)
    # The image itself is no part of the prompt.
    assert drawn[0].prompt.images == ()
    np.testing.assert_array_equal(drawn[1].medium, batch.media.images[6, 0])
    assert list(rows_to_make([batch], AUDIO, TOKENIZER)) == []


def test_rows_stop_behind_the_media_that_are_asked_about(subject):
    _, _, batch = subject
    asked = list(rows_to_answer([batch, batch], IMAGE, TOKENIZER))
    assert [question.right for question in asked] == ["ab", "xyz", "q"] * 2
    for question, row in zip(asked, (1, 5, 7), strict=False):
        # Nothing of the answer is in the prompt.
        assert question.text == "" and len(question.prompt.ids) == 3
        np.testing.assert_array_equal(question.prompt.images[0], batch.media.images[row, 0])
    (heard,) = rows_to_answer([batch], AUDIO, TOKENIZER)
    frames = batch.media.mel_lengths[3, 0]
    assert heard.right == "c" and heard.medium.shape == (frames, 8)
    np.testing.assert_array_equal(heard.prompt.mels[0], batch.media.mels[3, 0, :frames])
    assert [one.right for one in rows_to_answer([batch], IMAGE, TOKENIZER, task=1)] == [
        "ab",
        "xyz",
        "q",
    ]
    assert list(rows_to_answer([batch], IMAGE, TOKENIZER, task=3)) == []
    # Padding is of no task, whatever its number.
    padding = batch._replace(segment_ids=np.zeros_like(batch.segment_ids))
    assert list(rows_to_answer([padding], IMAGE, TOKENIZER)) == []


def test_answers_are_the_greedy_ones(subject):
    """As whole passes give them, one token after the other."""
    model, params, batch = subject
    asked = list(rows_to_answer([batch], IMAGE, TOKENIZER))
    found = answers(
        make_generator(model, params), model.config, asked, DEPTH, row_length=LENGTH, batch_size=2
    )
    whole = jax.jit(functools.partial(run_model, model))
    text = np.arange(model.config.vocab_size) < TOKENIZER.base.vocab_size
    text[TOKENIZER.pad_id] = False
    for said, row in zip(found, (1, 5, 7), strict=True):
        tokens, segments = np.array(batch.tokens), np.ones_like(batch.segment_ids)
        ids = []
        for place in range(2, LENGTH):
            now = batch._replace(tokens=tokens, segment_ids=segments)
            logits = np.asarray(whole(params, now, DEPTH, jax.random.key(0)).logits[row, place])
            token = int(np.where(text, logits, -np.inf).argmax())
            if token == TOKENIZER.eos_id:
                break
            ids.append(token)
            if place + 1 < LENGTH:
                tokens[row, place + 1] = token
        assert said == TOKENIZER.decode(ids)


def test_a_mesh_makes_and_answers_the_same(subject):
    model, params, batch = subject
    sharder = Sharder(make_mesh(MeshConfig(data=2, fsdp=2, sequence=2), jax.devices()))
    asked = list(rows_to_answer([batch], IMAGE, TOKENIZER))
    drawn = [question.prompt for question in rows_to_make([batch], IMAGE, TOKENIZER)]
    config = GenerationConfig(seed=1, depth=DepthConfig(depth=DEPTH))
    found = []
    for own in (model, model.copy(sharder=sharder)):
        of = make_generator(own, params)
        said = answers(of, model.config, asked, DEPTH, row_length=LENGTH)
        found.append((said, [medium.pixels for medium in of(config).make(drawn)]))
    assert found[0][0] == found[1][0]
    np.testing.assert_allclose(found[0][1], found[1][1], atol=1e-4)
