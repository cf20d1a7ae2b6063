"""Scores of made digits, from real images and clips to tables and files."""

import json
import sys
import types

import numpy as np
import pytest
from rich.console import Console

from megatransformer_jax.config.audio import MelConfig
from megatransformer_jax.config.data import DataConfig
from megatransformer_jax.config.image import ImageConfig
from megatransformer_jax.config.option import ConfigError, UserError
from megatransformer_jax.data.media.images import WORDS
from megatransformer_jax.data.media.records import AudioRecord
from megatransformer_jax.evaluation.media import judges as labelled_digits
from megatransformer_jax.evaluation.media.features import (
    CustomFeatures,
    frechet_distance,
    moments,
)
from megatransformer_jax.evaluation.media.judges import (
    DrawnReferee,
    SpokenDigitReferee,
    labelled_clips,
    labelled_images,
)
from megatransformer_jax.evaluation.media.sound_scores import TranscriptErrors
from megatransformer_jax.evaluation.media.table import (
    MediaRow,
    make_class_table,
    make_media_table,
    write_media_scores,
)
from megatransformer_jax.evaluation.media.validation import MediaScores, TaskScores

DIGITS = ImageConfig(height=8, width=8, channels=1)
MEL = MelConfig(
    sample_rate_hz=8000, num_mels=16, fft_samples=256, window_samples=256, hop_samples=128
)


@pytest.fixture(scope="module")
def splits():
    config = DataConfig(validation_fraction=0.2)
    return [labelled_images(config, DIGITS, split) for split in ("train", "validation")]


@pytest.fixture(scope="module")
def drawn(splits):
    training, held_out = splits
    referee = DrawnReferee(training, held_out)
    return referee, referee.score(held_out.images, held_out.labels)


def test_splits_are_the_runs(splits):
    training, held_out = splits
    assert len(training.images) + len(held_out.images) == 1797
    seen = {image.tobytes() for image in training.images}
    assert sum(image.tobytes() in seen for image in held_out.images) < 5
    assert held_out.prompts.keys() == set(range(10))
    assert "a handwritten three" in training.prompts[3]


def test_real_digits_are_recognised_and_others_are_not(splits, drawn):
    _, held_out = splits
    referee, scores = drawn
    assert scores.recognition.share == scores.recognition.judge_accuracy > 0.95
    assert scores.recognition.judge_media == len(held_out.images)
    assert scores.frechet_distance == pytest.approx(0, abs=1e-6)
    assert 0.1 < scores.frechet_distance_of_real < 5
    assert scores.inception_score == scores.inception_score_of_real > 8
    rng = np.random.default_rng(0)
    noise = referee.score(rng.normal(size=held_out.images.shape) * 2, held_out.labels)
    assert noise.recognition.share < 0.3
    assert noise.frechet_distance > 10 * scores.frechet_distance_of_real
    assert noise.inception_score < scores.inception_score
    with pytest.raises(ValueError, match=r"\[-1, 1\]"):
        referee.score(np.full((2, 8, 8, 1), np.nan), np.zeros(2, int))


def test_the_users_features_are_compared_and_nothing_else(splits, drawn, monkeypatch):
    training, held_out = splits
    module = types.ModuleType("user_module")
    module.features = lambda images: images.mean(axis=(2, 3))
    monkeypatch.setitem(sys.modules, "user_module", module)
    extract = CustomFeatures("user_module:features")
    shifted = np.clip(held_out.images + 0.5, -1, 1)
    scores = DrawnReferee(training, held_out, extract).score(shifted, held_out.labels)
    first, second = (moments(module.features(images)) for images in (shifted, held_out.images))
    assert scores.frechet_distance == pytest.approx(frechet_distance(first, second))
    assert scores.features == "features of user_module:features"
    assert scores.inception_score is scores.inception_score_of_real is None
    assert scores.recognition.judge_accuracy == drawn[1].recognition.judge_accuracy
    # With probabilities there is an Inception score. Other images than digits have no judge.
    halves = np.repeat(np.eye(2), [180, 179], axis=0)
    module.features = lambda images: (images.mean(axis=(2, 3)), halves)
    others = [images._replace(labels=None) for images in splits]
    with pytest.raises(UserError, match=r"\(359, 2\)\] for images \(1438"):
        DrawnReferee(*others, CustomFeatures("user_module:features"))
    others[0] = others[0]._replace(images=training.images[:359])
    found = DrawnReferee(*others, CustomFeatures("user_module:features")).score(shifted, None)
    assert found.inception_score == pytest.approx(2, abs=1e-4) and found.recognition is None
    validation = MediaScores(2, 0.4375, 1.5, 0.875, {}, {"loss": 0.125}, {})
    table = make_media_table([MediaRow(validation, drawn=found)], 2)
    assert "FID (features of user_module:features)" in table.columns[0]._cells
    assert str(table.caption).count("real training images have FID") == 1


@pytest.mark.parametrize(
    "found",
    [
        None,
        "text",
        np.zeros(4),
        (np.zeros((4, 2)),) * 3,
        np.zeros((3, 2)),
        np.ones((4, 1), bool),
        np.zeros((4, 0)),
        [[1.0], [1.0, 2.0], [1.0], [1.0]],
    ],
)
def test_what_is_not_features_is_an_error(found, monkeypatch):
    monkeypatch.setitem(sys.modules, "user_module", types.ModuleType("user_module"))
    sys.modules["user_module"].features = lambda images: found
    with pytest.raises(
        ConfigError, match=r"^image_features: user_module:features returned"
    ) as error:
        CustomFeatures("user_module:features")(np.zeros((4, 8, 8, 1)))
    assert "features [4, K]" in str(error.value)


class Sirens:
    """Ten words as tones, each of a pitch and a length of its own."""

    def __len__(self):
        return 40

    def __getitem__(self, index):
        label = index % 10
        times = np.arange(1000 + 130 * (index % 7)) / 8000
        wave = 0.5 * np.sin(2 * np.pi * (300 + 300 * label) * times).astype(np.float32)
        return AudioRecord(wave, 8000, WORDS[label], True, f"clip {index}")


def test_spoken_digits(monkeypatch):
    monkeypatch.setattr(labelled_digits, "build_audio_source", lambda *unused: Sirens())
    clips = labelled_clips(DataConfig(), MEL, "train")
    assert clips.mels.shape == (40, max(clips.lengths), 16)
    np.testing.assert_array_equal(clips.labels, np.arange(40) % 10)
    assert list(clips.lengths[:3]) == [8, 9, 10]
    assert not clips.mels[0, 8:].any()
    assert len(labelled_clips(DataConfig(), MEL, "train", every=3).labels) == 14
    referee = SpokenDigitReferee(clips, clips)
    scores = referee.score(clips.mels, clips.lengths, clips.labels)
    assert (scores.share, scores.judge_accuracy, scores.judge_media) == (1, 1, 40)
    wrong = referee.score(clips.mels, clips.lengths, (clips.labels + 1) % 10)
    assert wrong.share == 0 and wrong.by_class[1].mistaken_for == "zero"


def test_tables_and_files(tmp_path, drawn):
    scores = drawn[1]
    tasks = {"caption": TaskScores(0.5, 0.75, 0.625, 9), "speak": TaskScores(0.25, 1.0, 1.0, 3)}
    validation = MediaScores(2, 0.4375, 1.5, 0.875, tasks, {"loss": 0.125}, {})
    rows = [
        MediaRow(validation, drawn=scores),
        MediaRow(validation, TranscriptErrors(0.375, 0.1, 0.5, 8), scores, scores.recognition),
    ]
    console = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(make_media_table(rows, 2))
    console.print(make_class_table("Drawn", scores.recognition))
    text = " ".join(console.export_text().replace("│", " ").split())
    for line in (
        "text loss 0.4375 0.4375",
        "captions right 0.625 0.625",
        "word errors 0.375",
        "image loss 0.1250 0.1250",
        "FID (digits features) 0.00 0.00",
        "text loss, task speak 0.2500 0.2500",
    ):
        assert line in text
    assert "audio loss" not in text and "transcripts right" not in text
    assert "2 *" in text and "real training digits have FID" in text
    assert f"{scores.recognition.judge_accuracy:.1%} of 359 real held-out ones" in text
    path = write_media_scores(tmp_path, rows, 2)
    written = json.loads(path.read_text())
    assert written["trained_depth"] == 2
    first, second = written["rows"]
    assert first["transcripts"] is None
    assert second["transcripts"]["word_error_rate"] == 0.375
    assert first["validation"]["tasks"]["caption"]["exact_accuracy"] == 0.625
    assert second["drawn"]["recognition"]["by_class"][3]["name"] == "three"
    assert second["drawn"]["features"] == "digits features"
