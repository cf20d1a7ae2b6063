"""Sums by task and of decoders' losses; greedy answers and what validation calls exact."""

import functools

import jax
import numpy as np
import pytest
from smallest_media_model import Medium, make_model, media_batch

from megatransformer_jax.evaluation.media.validation import (
    MediaValidationSet,
    is_answer,
    make_media_eval_step,
    mean_media_scores,
    run_model,
)
from megatransformer_jax.types import AUDIO, IMAGE

KEY = jax.random.key(7)
STEPS = np.int32(2)
TASKS = ("draw", "caption", "text", "transcribe", "speak", "unused")
DRAWN, READ = Medium(IMAGE, True), Medium(IMAGE)
ROWS = [
    (0, ("ab", DRAWN)),
    (1, (READ, "abcd")),
    (1, (READ, "xy")),
    (2, ("hello",)),
    (0, ("c", DRAWN)),
    (3, (Medium(AUDIO), "uv")),
    (4, ("w", Medium(AUDIO, True))),
    None,
]


@pytest.fixture(scope="module")
def subject():
    model, params = make_model()
    return model, params, jax.jit(make_media_eval_step(model, KEY, len(TASKS)))


@pytest.fixture(scope="module")
def batch(subject):
    return media_batch(subject[0], ROWS)


def test_sums_are_those_of_rows_one_by_one(subject, batch):
    model, params, step = subject
    sums = jax.device_get(step(params, batch, STEPS))
    output = jax.jit(functools.partial(run_model, model))(params, batch, STEPS, KEY)
    logits = np.asarray(output.logits, np.float64)
    log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    wanted = np.zeros((5, len(TASKS)))
    for row, (task, parts) in enumerate(ROWS[:-1]):
        places = np.flatnonzero(batch.loss_mask[row])
        right = log_probs[row].argmax(-1) == batch.targets[row]
        wanted[0, task] -= log_probs[row, places, batch.targets[row, places]].sum()
        wanted[1, task] += len(places)
        wanted[2, task] += right[places].sum()
        medium = np.flatnonzero(batch.media.follows[row])
        if len(medium):
            answer = places[places > medium[-1]]
            assert len(answer) == (len(parts[1]) + 1 if task in (1, 3) else 1)
            wanted[3, task] += 1
            wanted[4, task] += right[answer].all()
    np.testing.assert_allclose(np.stack(sums.tasks), wanted, rtol=1e-4)


def test_losses_of_media_are_of_those_to_be_made(subject, batch):
    _, params, step = subject
    whole = step(params, batch, STEPS)
    assert (whole.drawn_images, whole.spoken_clips) == (2, 1)
    # A part of a batch has that part's sums; what is only read has none.
    without_first = batch.media.is_drawn & (np.arange(len(ROWS)) > 0)[:, None]
    media = batch.media._replace(is_drawn=without_first)
    rest = step(params, batch._replace(media=media), STEPS)
    alone = batch.media._replace(is_drawn=batch.media.is_drawn & ~without_first)
    first = step(params, batch._replace(media=alone), STEPS)
    assert (rest.drawn_images, first.drawn_images) == (1, 1)
    for name, value in whole.images.items():
        assert float(rest.images[name]) > 0
        assert float(value) == pytest.approx(float(rest.images[name] + first.images[name]))
    assert {"loss", "duration"} <= whole.clips.keys()
    nothing = batch.media._replace(is_spoken=np.zeros_like(batch.media.is_spoken))
    silent = step(params, batch._replace(media=nothing), STEPS)
    assert silent.spoken_clips == 0 and not any(silent.clips.values())
    np.testing.assert_array_equal(silent.tasks.tokens, whole.tasks.tokens)


def test_means_and_metrics(subject, batch):
    _, params, step = subject
    scores = MediaValidationSet([batch, batch], step, TASKS).score(params, 2)
    sums = jax.device_get(step(params, batch, STEPS))
    text = sums.tasks
    metrics = scores.metrics()
    assert metrics["loss"] == pytest.approx(text.cross_entropy.sum() / text.tokens.sum())
    assert metrics["perplexity"] == pytest.approx(np.exp(metrics["loss"]))
    assert metrics["accuracy"] == pytest.approx(text.correct.sum() / text.tokens.sum())
    assert metrics["draw_text_loss"] == pytest.approx(text.cross_entropy[0] / text.tokens[0])
    assert metrics["caption_token_accuracy"] == pytest.approx(text.correct[1] / text.tokens[1])
    assert metrics["caption_accuracy"] == pytest.approx(text.exact_answers[1] / 2)
    assert metrics["transcription_accuracy"] == text.exact_answers[3]
    assert metrics["audio_duration"] == pytest.approx(float(sums.clips["duration"]))
    assert metrics["image_loss"] == pytest.approx(sums.images["loss"] / 2)
    assert "unused_text_loss" not in metrics
    assert scores.tasks["text"].exact_accuracy is None
    assert scores.tasks["text"].tokens == 2 * 6
    again = MediaValidationSet([batch], step, TASKS).score(params, 2).metrics()
    assert again == {name: pytest.approx(value) for name, value in metrics.items()}
    with pytest.raises(ValueError, match="at least one batch"):
        MediaValidationSet([], step, TASKS)
    empty = jax.tree.map(np.zeros_like, sums)
    with pytest.raises(ValueError, match="no token"):
        mean_media_scores(2, [empty], TASKS)


def test_an_answer_is_exact_if_it_is_the_likeliest(subject, batch):
    """All of its tokens, each behind the right ones."""
    model, params, step = subject
    whole = jax.jit(functools.partial(run_model, model))
    tokens, targets, loss_mask = (np.array(batch[index]) for index in range(3))
    segments = np.ones_like(batch.segment_ids)
    for place in range(2, tokens.shape[1]):
        now = batch._replace(tokens=tokens.copy(), segment_ids=segments)
        likeliest = np.asarray(whole(params, now, STEPS, KEY).logits).argmax(axis=-1)
        for row in (1, 2):
            targets[row, place] = likeliest[row, place]
            loss_mask[row, : place + 1] = np.arange(place + 1) >= 2
            if place + 1 < tokens.shape[1]:
                tokens[row, place + 1] = likeliest[row, place]
    greedy = batch._replace(
        tokens=tokens, targets=targets, loss_mask=loss_mask, segment_ids=segments
    )
    assert step(params, greedy, STEPS).tasks.exact_answers[1] == 2
    targets[2, 4] += 1
    assert step(params, greedy, STEPS).tasks.exact_answers[1] == 1


def test_text_behind_the_last_medium():
    follows = np.array([[0, 1, 0, 2, 0, 0], [0, 0, 0, 0, 0, 0]])
    for counts, expected in (
        ([[1, 0, 1, 0, 1, 1], [1] * 6], [[0, 0, 0, 0, 1, 1], [0] * 6]),
        # A question that is given is not part of the answer, and padding behind the end is.
        ([[1, 0, 1, 0, 0, 1], [1] * 6], [[0, 0, 0, 0, 0, 1], [0] * 6]),
        ([[1, 0, 1, 0, 1, 0], [1] * 6], [[0, 0, 0, 0, 1, 1], [0] * 6]),
        ([[1, 0, 1, 0, 0, 0], [1] * 6], [[0] * 6, [0] * 6]),
    ):
        found = is_answer(jax.numpy.asarray(follows), jax.numpy.asarray(counts, float))
        np.testing.assert_array_equal(found, expected)
