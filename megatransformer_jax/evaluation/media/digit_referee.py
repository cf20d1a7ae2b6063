"""What is said of digits that a model makes: how many are recognised, and how real they look."""

import dataclasses

import numpy as np
from jaxtyping import Float, Int

from megatransformer_jax.data.media.images import WORDS
from megatransformer_jax.evaluation.media.digit_judge import DigitJudge
from megatransformer_jax.evaluation.media.features import DigitsFeatures
from megatransformer_jax.evaluation.media.frechet import frechet_distance, moments
from megatransformer_jax.evaluation.media.inception_score import inception_score
from megatransformer_jax.evaluation.media.labelled_digits import LabelledClips, LabelledImages
from megatransformer_jax.evaluation.media.recognition import Recognition, recognition
from megatransformer_jax.evaluation.media.spoken_digit_judge import SpokenDigitJudge


@dataclasses.dataclass(frozen=True)
class DrawnScores:
    """Scores of drawn digits.

    Attributes:
      recognition: by a support vector machine, which has seen no drawn image.
      frechet_distance: between the features of drawn images and of real held-out ones; 0 is best.
      frechet_distance_of_real: the same of real training images: what a perfect model could reach.
      inception_score: of drawn images, 1 to 10.
      inception_score_of_real: of real held-out images.
      features: what the features are; no other ones compare.
    """

    recognition: Recognition
    frechet_distance: float
    frechet_distance_of_real: float
    inception_score: float
    inception_score_of_real: float
    features: str


class DrawnDigitReferee:
    """Scores drawn digits against real ones.

    Args:
      training: real images that the judge and the feature extractor learn from.
      held_out: real images that neither they nor the model have seen.
      seed: of the feature extractor.
    """

    def __init__(self, training: LabelledImages, held_out: LabelledImages, seed: int = 0):
        self._judge = DigitJudge(training.images, training.labels)
        self._accuracy = self._judge.accuracy(held_out.images, held_out.labels)
        self._extract = DigitsFeatures(training.images, training.labels, seed)
        self._real = self._extract(held_out.images)
        of_training = moments(self._extract(training.images).features)
        self._distance_of_real = frechet_distance(of_training, moments(self._real.features))

    def score(
        self, images: Float[np.ndarray, "N height width C"], wanted: Int[np.ndarray, "N"]
    ) -> DrawnScores:
        """Scores images, cut to [-1, 1] as they are when shown.

        Raises:
          UserError: if there are fewer than two images, or a value is not finite.
        """
        images = np.clip(images, -1, 1)
        found = self._extract(images)
        seen = self._judge(images)
        return DrawnScores(
            recognition=recognition(
                wanted, seen, WORDS, self._accuracy, len(self._real.probabilities)
            ),
            frechet_distance=frechet_distance(
                moments(found.features), moments(self._real.features)
            ),
            frechet_distance_of_real=self._distance_of_real,
            inception_score=inception_score(found.probabilities).mean,
            inception_score_of_real=inception_score(self._real.probabilities).mean,
            features=self._extract.name,
        )


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
