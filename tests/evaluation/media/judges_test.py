"""Judges and the digits features know real held-out media, and what they refuse."""

import numpy as np
import pytest
from sklearn.datasets import load_digits

from megatransformer_jax.config.option import UserError
from megatransformer_jax.evaluation.media.features import DigitsFeatures, FeatureExtractor
from megatransformer_jax.evaluation.media.judges import (
    ClassCount,
    DigitJudge,
    SpokenDigitJudge,
    recognition,
)

NAMES = ("zero", "one", "two")


@pytest.fixture(scope="module")
def digits():
    data = load_digits()
    images = (data.images / 8 - 1).astype(np.float32)[..., None]
    return (images[:1200], data.target[:1200]), (images[1200:], data.target[1200:])


def test_the_judge_reads_real_digits(digits):
    training, held_out = digits
    judge = DigitJudge(*training)
    assert judge.accuracy(*held_out) > 0.95
    seen = judge(held_out[0])
    assert judge.accuracy(*held_out) == np.mean(seen == held_out[1])
    np.testing.assert_array_equal(judge(held_out[0][:3]), seen[:3])
    with pytest.raises(UserError, match=r"\(8, 9, 1\) do not go to a classifier trained on"):
        judge(np.zeros((1, 8, 9, 1), np.float32))
    with pytest.raises(UserError, match=r"\[-1, 1\]"):
        judge(np.full((1, 8, 8, 1), 16, np.float32))


def test_features_tell_digits_apart(digits):
    (images, labels), held_out = digits
    extractor = DigitsFeatures(images[:600], labels[:600])
    assert isinstance(extractor, FeatureExtractor)
    found = extractor(held_out[0])
    assert found.features.shape == (len(held_out[0]), 64)
    assert np.mean(found.probabilities.argmax(axis=1) == held_out[1]) > 0.9
    np.testing.assert_allclose(found.probabilities.sum(axis=1), 1)
    # The features are what the probabilities come from.
    network = extractor._network
    logits = found.features @ network.coefs_[1] + network.intercepts_[1]
    odds = np.exp(logits - logits.max(axis=1, keepdims=True))
    np.testing.assert_allclose(found.probabilities, odds / odds.sum(1, keepdims=True), atol=1e-6)
    again, other = (DigitsFeatures(images[:600], labels[:600], seed=seed) for seed in (0, 1))
    np.testing.assert_array_equal(again(held_out[0][:2]).features, found.features[:2])
    assert np.abs(other(held_out[0][:2]).features - found.features[:2]).max() > 0.1
    with pytest.raises(UserError, match="1 media do not go with 2 labels"):
        DigitsFeatures(images[:1], labels[:2])
    with pytest.raises(UserError, match="at least two classes"):
        DigitJudge(images[:1], labels[:1])


def spoken(labels, rng):
    """Clips of several speeds whose pitch moves as the label says; zeros beyond their ends."""
    mels = np.zeros((len(labels), 20, 6), np.float32)
    lengths = rng.integers(8, 21, size=len(labels))
    for mel, length, label in zip(mels, lengths, labels, strict=True):
        places = np.linspace(0, 1, length)
        path = (np.full(length, 0.5), places, 1 - places)[label]
        mel[:length] = -np.abs(np.arange(6) - 5 * path[:, None]) / 5 + rng.normal(0, 0.1)
    return mels, lengths, labels


def test_the_judge_hears_spoken_digits():
    rng = np.random.default_rng(0)
    training, held_out = (spoken(rng.integers(0, 3, size=60), rng) for _ in range(2))
    judge = SpokenDigitJudge(*training)
    assert judge.accuracy(*held_out) > 0.95
    mels, lengths, _ = held_out
    padded = np.pad(mels, ((0, 0), (0, 5), (0, 0)), constant_values=9)
    padded[:, :20] = np.where(np.arange(20)[:, None] < lengths[:, None, None], mels, 9)
    np.testing.assert_array_equal(judge(padded, lengths), judge(mels, lengths))
    np.testing.assert_array_equal(judge(mels + 1, lengths), judge(mels, lengths))
    assert judge(mels[:1], np.ones(1, int)).shape == (1,)
    with pytest.raises(UserError, match="1 to 20 frames"):
        judge(mels, lengths * 0)
    with pytest.raises(UserError, match="1 to 20 frames"):
        judge(mels, lengths + 20)
    with pytest.raises(UserError, match="5 mel bins"):
        judge(mels[:, :, 1:], lengths)


def test_recognition_counts_by_class():
    wanted, seen = np.array([0, 0, 0, 2, 2]), np.array([0, 1, 1, 2, 2])
    found = recognition(wanted, seen, NAMES, judge_accuracy=0.9, judge_media=50)
    assert (found.share, found.media) == (0.6, 5)
    assert (found.judge_accuracy, found.judge_media) == (0.9, 50)
    assert found.by_class == (ClassCount("zero", 3, 1, "one"), ClassCount("two", 2, 2, None))
    with pytest.raises(UserError, match="no medium"):
        recognition(wanted[:0], seen[:0], NAMES, 1.0, 1)
