"""Judges of digits, drawn and spoken, that are independent of the model that made them."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from megatransformer_jax.config.audio import MelConfig
from megatransformer_jax.config.data import DataConfig
from megatransformer_jax.config.image import ImageConfig
from megatransformer_jax.config.option import UserError
from megatransformer_jax.data.media.build import build_audio_source, build_image_source
from megatransformer_jax.data.media.images import WORDS
from megatransformer_jax.data.mel import normalized_mel
from megatransformer_jax.data.sources.record import BadRecord
from megatransformer_jax.evaluation.media.features import (
    DigitsFeatures,
    FeatureExtractor,
    Features,
    check_labelled,
    flat_pixels,
    frechet_distance,
    inception_score,
    moments,
)
from megatransformer_jax.extras import import_extra

# ------------------------------------------------------------------------------
# Reads digits in images.

_JUDGES = "judges of images and sound"


def _support_vectors() -> Any:
    # gamma='scale' suits features of any number and contrast; C=10 as digits hardly overlap.
    return import_extra("sklearn.svm", "media", _JUDGES).SVC(C=10.0, gamma="scale")


class DigitJudge:
    """A support vector machine on pixels, trained on real images alone.

    Args:
      images: real ones of the training split, in [-1, 1].
      labels: the digit of each.

    Raises:
      UserError: if images and labels differ in number or show fewer than two digits.
    """

    def __init__(
        self, images: Float[np.ndarray, "N height width C"], labels: Int[np.ndarray, "labels"]
    ):
        check_labelled(images, labels)
        self._shape = images.shape[1:]
        self._machine = _support_vectors()
        self._machine.fit(flat_pixels(images, self._shape), labels)

    def __call__(self, images: Float[np.ndarray, "N height width C"]) -> Int[np.ndarray, "N"]:
        """The digit in each image.

        Raises:
          UserError: if the images have another shape than those of the training.
        """
        return self._machine.predict(flat_pixels(images, self._shape))

    def accuracy(
        self, images: Float[np.ndarray, "N height width C"], labels: Int[np.ndarray, "labels"]
    ) -> float:
        """Share of images in which the digit is right, 0 to 1; give held-out ones."""
        return float(np.mean(self(images) == labels))


# ------------------------------------------------------------------------------
# Hears digits in mel spectrograms.

# Frames that every clip is stretched to: enough to tell the sounds of a word apart in order.
_FRAMES = 16


class SpokenDigitJudge:
    """A support vector machine on spectrograms stretched to one length, trained on real clips.

    Loudness plays no part: the mean of each clip is taken off its spectrogram.

    Args:
      mels: log-mel spectrograms of real clips of the training split, [N, F, M].
      lengths: frames of each clip.
      labels: the digit of each.

    Raises:
      UserError: if numbers differ, a clip is empty, or there are fewer than two digits.
    """

    def __init__(
        self,
        mels: Float[np.ndarray, "N F M"],
        lengths: Int[np.ndarray, "N"],
        labels: Int[np.ndarray, "labels"],
    ):
        check_labelled(mels, labels)
        self._num_mels = mels.shape[2]
        scaler = import_extra("sklearn.preprocessing", "media", _JUDGES).StandardScaler()
        pipeline = import_extra("sklearn.pipeline", "media", _JUDGES)
        self._machine = pipeline.make_pipeline(scaler, _support_vectors())
        self._machine.fit(self._stretched(mels, lengths), labels)

    def __call__(
        self, mels: Float[np.ndarray, "N F M"], lengths: Int[np.ndarray, "N"]
    ) -> Int[np.ndarray, "N"]:
        """The digit in each clip.

        Raises:
          UserError: if a clip is empty or has other mel bins than those of the training.
        """
        return self._machine.predict(self._stretched(mels, lengths))

    def accuracy(
        self,
        mels: Float[np.ndarray, "N F M"],
        lengths: Int[np.ndarray, "N"],
        labels: Int[np.ndarray, "labels"],
    ) -> float:
        """Share of clips in which the digit is right, 0 to 1; give held-out ones."""
        return float(np.mean(self(mels, lengths) == labels))

    def _stretched(self, mels: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        if mels.shape[2] != self._num_mels:
            raise UserError(
                f"spectrograms of {mels.shape[2]} mel bins do not go to a judge trained on "
                f"{self._num_mels}; train one on such spectrograms."
            )
        if not len(mels) or np.min(lengths) < 1 or np.max(lengths) > mels.shape[1]:
            raise UserError(
                f"every clip must have 1 to {mels.shape[1]} frames, and there must be one; the "
                f"lengths are {np.asarray(lengths).tolist()}."
            )
        return np.stack([_stretch(mel[:n]) for mel, n in zip(mels, lengths, strict=True)])


def _stretch(mel: np.ndarray) -> np.ndarray:
    """[n, M] -> [_FRAMES * M] by linear interpolation between frames."""
    places = np.linspace(0, len(mel) - 1, _FRAMES)
    before = np.minimum(places.astype(int), max(len(mel) - 2, 0))
    after = np.minimum(before + 1, len(mel) - 1)
    weight = (places - before)[:, None]
    stretched = (1 - weight) * mel[before] + weight * mel[after]
    return (stretched - stretched.mean()).ravel()


# ------------------------------------------------------------------------------
# Real digits with their labels, written and spoken, of the splits that a run was trained on.


# They are held in memory; the features of so many are known well enough.
MAX_REAL_IMAGES = 4096


class LabelledImages(NamedTuple):
    """Images [N, height, width, C] in [-1, 1], the digit in each, and prompts by digit.

    Other images than digits have no labels (None), and each has its own prompts, by its number.
    """

    images: np.ndarray
    labels: np.ndarray | None
    prompts: dict[int, tuple[str, ...]]


class LabelledClips(NamedTuple):
    """Normalised log-mel spectrograms [N, F, M], their frames, and the digit in each."""

    mels: np.ndarray
    lengths: np.ndarray
    labels: np.ndarray


def labelled_images(config: DataConfig, image: ImageConfig, split: str) -> LabelledImages:
    """The images of a split, 'train' or 'validation': all digits; of others the first thousands.

    Raises:
      UserError: if there are none.
    """
    source = build_image_source(config, image, split)
    is_digits = config.media.images.source == "digits"
    count = len(source) if is_digits else min(len(source), MAX_REAL_IMAGES)
    records = [source[number] for number in range(count)]
    good = [record for record in records if not isinstance(record, BadRecord)]
    if not good:
        raise UserError(f"the {split} split has no image that can be read; give more data.")
    pixels = np.stack([record.pixels for record in good])
    if not is_digits:
        return LabelledImages(pixels, None, {n: one.prompts for n, one in enumerate(good)})
    labels = np.array([WORDS.index(record.captions[0]) for record in good])
    prompts = {
        int(label): good[int(np.argmax(labels == label))].prompts for label in np.unique(labels)
    }
    return LabelledImages(pixels, labels, prompts)


def labelled_clips(config: DataConfig, mel: MelConfig, split: str, every: int = 1) -> LabelledClips:
    """Every n-th clip of a split, 'train' or 'validation', of source 'spoken_digits'."""
    source = build_audio_source(config, mel, split)
    records = [source[number] for number in range(0, len(source), every)]
    good = [record for record in records if not isinstance(record, BadRecord)]
    made = [normalized_mel(record.waveform, mel) for record in good]
    lengths = np.array([len(one) for one in made])
    mels = np.zeros((len(made), lengths.max(), mel.num_mels), np.float32)
    for row, one in zip(mels, made, strict=True):
        row[: len(one)] = one
    return LabelledClips(
        mels, lengths, np.array([WORDS.index(record.transcript) for record in good])
    )


# ------------------------------------------------------------------------------
# How many generated media an independent judge recognises as what they were to show.


@dataclasses.dataclass(frozen=True)
class ClassCount:
    """Of one class: media that were to show it, and those in which the judge sees it.

    Attributes:
      mistaken_for: name of the class that the judge sees most often instead; None if in none.
    """

    name: str
    media: int
    recognised: int
    mistaken_for: str | None


@dataclasses.dataclass(frozen=True)
class Recognition:
    """What a judge makes of a set of media.

    Attributes:
      share: recognised media, 0 to 1.
      media: how many.
      judge_accuracy: of the judge on real held-out media, which bounds what `share` can tell.
      judge_media: how many these were.
      by_class: one row for each class that was asked for.
    """

    share: float
    media: int
    judge_accuracy: float
    judge_media: int
    by_class: tuple[ClassCount, ...]


def recognition(
    wanted: Int[np.ndarray, "N"],
    seen: Int[np.ndarray, "N"],
    names: Sequence[str],
    judge_accuracy: float,
    judge_media: int,
) -> Recognition:
    """Compares what media were to show with what the judge sees.

    Args:
      wanted: class of each medium.
      seen: class that the judge gives it.
      names: of the classes.
      judge_accuracy: see `Recognition`.
      judge_media: the same.

    Raises:
      UserError: if there is no medium.
    """
    if not len(wanted):
        raise UserError("there is no medium to judge; generate at least one.")
    rows = [_class_count(int(label), wanted, seen, names) for label in np.unique(wanted)]
    return Recognition(
        share=float(np.mean(wanted == seen)),
        media=len(wanted),
        judge_accuracy=judge_accuracy,
        judge_media=judge_media,
        by_class=tuple(rows),
    )


def _class_count(
    label: int, wanted: np.ndarray, seen: np.ndarray, names: Sequence[str]
) -> ClassCount:
    of_class = seen[wanted == label]
    wrong = of_class[of_class != label]
    mistaken_for = names[int(np.bincount(wrong).argmax())] if len(wrong) else None
    return ClassCount(names[label], len(of_class), int(np.sum(of_class == label)), mistaken_for)


# ------------------------------------------------------------------------------
# What is said of digits that a model makes: how many are recognised, and how real they look.


@dataclasses.dataclass(frozen=True)
class DrawnScores:
    """Scores of drawn images.

    Attributes:
      recognition: of digits, by a support vector machine which has seen no drawn image; None of
        other images.
      frechet_distance: between the features of drawn images and of real held-out ones; 0 is best.
      frechet_distance_of_real: the same of real training images: what a perfect model could reach.
      inception_score: of drawn images, 1 to the number of classes; None without probabilities.
      inception_score_of_real: of real held-out images.
      features: what the features are; no other ones compare.
    """

    recognition: Recognition | None
    frechet_distance: float
    frechet_distance_of_real: float
    inception_score: float | None
    inception_score_of_real: float | None
    features: str


class DrawnReferee:
    """Scores drawn images against real ones.

    Args:
      training: real images that the judge and the feature extractor learn from.
      held_out: real images that neither they nor the model have seen.
      extract: the features to compare. None: those of `DigitsFeatures`, for which there must be
        labels.
      seed: of the digits features.
    """

    def __init__(
        self,
        training: LabelledImages,
        held_out: LabelledImages,
        extract: FeatureExtractor | None = None,
        seed: int = 0,
    ):
        self._judge: DigitJudge | None = None
        if training.labels is not None and held_out.labels is not None:
            self._judge = DigitJudge(training.images, training.labels)
            self._accuracy = self._judge.accuracy(held_out.images, held_out.labels)
        if extract is None:
            assert training.labels is not None
            extract = DigitsFeatures(training.images, training.labels, seed)
        self._extract = extract
        self._real = self._extract(held_out.images)
        of_training = moments(self._extract(training.images).features)
        self._distance_of_real = frechet_distance(of_training, moments(self._real.features))

    def score(
        self, images: Float[np.ndarray, "N height width C"], wanted: Int[np.ndarray, "N"] | None
    ) -> DrawnScores:
        """Scores images, cut to [-1, 1] as they are when shown.

        Args:
          images: as the model draws them.
          wanted: the digit that each is to show; None of other images.

        Raises:
          UserError: if there are fewer than two images, or a value is not finite.
        """
        images = np.clip(images, -1, 1)
        found, seen = self._extract(images), None
        if self._judge is not None and wanted is not None:
            count = len(self._real.features)
            seen = recognition(wanted, self._judge(images), WORDS, self._accuracy, count)
        return DrawnScores(
            recognition=seen,
            frechet_distance=frechet_distance(
                moments(found.features), moments(self._real.features)
            ),
            frechet_distance_of_real=self._distance_of_real,
            inception_score=_inception_score(found),
            inception_score_of_real=_inception_score(self._real),
            features=self._extract.name,
        )


def _inception_score(found: Features) -> float | None:
    return None if found.probabilities is None else inception_score(found.probabilities).mean


class SpokenDigitReferee:
    """Scores spoken digits by a judge that has heard real ones alone.

    Args:
      training: real clips that the judge learns from.
      held_out: real clips that neither it nor the model has heard.
    """

    def __init__(self, training: LabelledClips, held_out: LabelledClips):
        self._judge = SpokenDigitJudge(*training)
        self._accuracy = self._judge.accuracy(*held_out)
        self._held_out = len(held_out.labels)

    def score(
        self,
        mels: Float[np.ndarray, "N F M"],
        lengths: Int[np.ndarray, "N"],
        wanted: Int[np.ndarray, "N"],
    ) -> Recognition:
        """How many clips are recognised.

        Raises:
          UserError: if there is none, or one is empty.
        """
        seen = self._judge(mels, lengths)
        return recognition(wanted, seen, WORDS, self._accuracy, self._held_out)
