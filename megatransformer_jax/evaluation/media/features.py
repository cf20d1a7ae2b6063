"""Features of images, and what is computed from them: Frechet distance, Inception score.

The published scores use Inception-v3, whose weights must be downloaded; a function of the user's
may run it. The extractor here needs none: a small network trained on the data set's own real
images in a second. Its numbers compare only with those of the same extractor, so that every result
carries its name.
"""

from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float, Int

from megatransformer_jax.config.option import ConfigError, UserError
from megatransformer_jax.extras import import_extra, import_function

# ------------------------------------------------------------------------------
# The extractors.

_HIDDEN_UNITS = 64
_MAX_EPOCHS = 200


class Features(NamedTuple):
    """Of N images: features [N, K] and probabilities of the classes [N, C].

    Without probabilities (None) there is no Inception score.
    """

    features: Float[np.ndarray, "N K"]
    probabilities: Float[np.ndarray, "N C"] | None


@runtime_checkable
class FeatureExtractor(Protocol):
    """Anything that turns images into features.

    Attributes:
      name: goes into the name of every score, as in 'FID (digits features)'.
    """

    name: str

    def __call__(self, images: Float[np.ndarray, "N height width C"]) -> Features:
        """Features of images in [-1, 1]; those of one image do not depend on the others."""


class DigitsFeatures:
    """One hidden layer of 64 units, trained to name digits; its activations are the features.

    Args:
      images: real ones, in [-1, 1].
      labels: the digit of each.
      seed: of the first weights and the order of the examples. The same images, labels and seed
        give the same features.

    Raises:
      UserError: if images and labels differ in number or show fewer than two digits.
    """

    name = "digits features"

    def __init__(
        self,
        images: Float[np.ndarray, "N height width C"],
        labels: Int[np.ndarray, "labels"],
        seed: int = 0,
    ):
        check_labelled(images, labels)
        self._shape = images.shape[1:]
        networks = import_extra("sklearn.neural_network", "media", "features of images")
        self._network = networks.MLPClassifier(
            hidden_layer_sizes=(_HIDDEN_UNITS,),
            alpha=1e-3,
            batch_size=min(64, len(images)),
            learning_rate_init=3e-3,
            max_iter=_MAX_EPOCHS,
            tol=1e-3,
            random_state=seed,
        )
        self._network.fit(flat_pixels(images, self._shape), labels)

    def __call__(self, images: Float[np.ndarray, "N height width C"]) -> Features:
        """Features [N, 64] and probabilities of the digits.

        Raises:
          UserError: if the images have another shape than those of the training.
        """
        pixels = flat_pixels(images, self._shape)
        hidden = pixels @ self._network.coefs_[0] + self._network.intercepts_[0]
        return Features(np.maximum(hidden, 0.0), self._network.predict_proba(pixels))


class CustomFeatures:
    """A function of the user's, such as one that runs Inception-v3.

    It gets float32 images [N, height, width, C] in [-1, 1], of the model's size, and returns
    features [N, K], or a pair of features and probabilities of classes [N, classes]. It must treat
    each image by itself.

    Args:
      name: 'package.module:name'.

    Raises:
      ConfigError: if there is no such function.
    """

    OPTION = "image_features"

    def __init__(self, name: str):
        self.name = f"features of {name}"
        self._function = import_function(self.OPTION, name)

    def __call__(self, images: Float[np.ndarray, "N height width C"]) -> Features:
        """What the function returns.

        Raises:
          ConfigError: if that is not of the form above. Errors of the function itself pass.
        """
        found = self._function(np.asarray(images, np.float32))
        parts = found if isinstance(found, tuple) else (found,)
        try:
            arrays = [np.asarray(part) for part in parts]
        except ValueError:  # Lists of several lengths.
            arrays = [np.asarray(None)]
        shapes = [array.shape for array in arrays]
        if not 1 <= len(arrays) <= 2 or any(
            array.ndim != 2
            or len(array) != len(images)
            or not array.shape[1]
            or array.dtype.kind not in "fiu"
            for array in arrays
        ):
            raise ConfigError(
                self.OPTION,
                f"{self.name.removeprefix('features of ')} returned "
                f"{type(found).__name__} with {shapes} for images {images.shape}; it must return "
                f"features [{len(images)}, K], or a pair of them and of probabilities "
                f"[{len(images)}, classes].",
            )
        features, *rest = (array.astype(np.float64) for array in arrays)
        return Features(features, rest[0] if rest else None)


def check_labelled(media: np.ndarray, labels: np.ndarray) -> None:
    """Checks that a classifier can be trained on the media.

    Raises:
      UserError: if there is not one label for each, or fewer than two different ones.
    """
    if len(media) != len(labels):
        raise UserError(
            f"{len(media)} media do not go with {len(labels)} labels; give one for each."
        )
    if len(np.unique(labels)) < 2:
        raise UserError(
            f"a classifier needs media of at least two classes, and these are of "
            f"{len(np.unique(labels))}; give more."
        )


def flat_pixels(
    images: Float[np.ndarray, "N height width C"], shape: tuple[int, ...]
) -> Float[np.ndarray, "N pixels"]:
    """One row of float64 pixels per image.

    Raises:
      UserError: if the images are not of the shape (height, width, C), or not in [-1, 1].
    """
    if images.shape[1:] != shape:
        raise UserError(
            f"images of the shape {images.shape[1:]} do not go to a classifier trained on "
            f"{shape}; train one on images of that shape."
        )
    if not len(images) or not np.abs(images).max() <= 1.0001:
        raise UserError(
            "there must be at least one image, and all values must lie in [-1, 1]; scale or clip "
            "them."
        )
    return np.asarray(images, np.float64).reshape(len(images), -1)


# ------------------------------------------------------------------------------
# Frechet distance between the features of two sets of media (Heusel et al., 2017, 1706.08500).
#
# With Inception-v3 as the extractor of image features this is the FID. With any other extractor it
# is another number, which compares only with those of the same extractor: name it with the result.

# Eigenvalues that rounding made negative; relative to the largest.
_ROUNDING = 1e-6


class Moments(NamedTuple):
    """Mean and covariance of features, float64."""

    mean: Float[np.ndarray, "K"]
    covariance: Float[np.ndarray, "K K"]


def moments(features: Float[np.ndarray, "N K"]) -> Moments:
    """Mean and unbiased covariance of N rows of features.

    Raises:
      UserError: if there are fewer than two rows, or a value is not finite.
    """
    if len(features) < 2:
        raise UserError(
            f"a covariance needs at least 2 media, and there are {len(features)}; give more."
        )
    rows = np.asarray(features, np.float64)
    if not np.isfinite(rows).all():
        raise UserError(
            "features hold values that are not finite; look at the media they come from."
        )
    mean = rows.mean(axis=0)
    centred = rows - mean
    return Moments(mean, centred.T @ centred / (len(rows) - 1))


def frechet_distance(first: Moments, second: Moments) -> float:
    """Squared Frechet (2-Wasserstein) distance between two Gaussians; 0 to infinity, 0 is best.

    |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)). The trace of the root comes from the eigenvalues
    of C1^(1/2) C2 C1^(1/2), which is symmetric, so that nothing complex arises and covariances
    without full rank do no harm.

    Raises:
      UserError: if the numbers of features differ.
    """
    if first.mean.shape != second.mean.shape:
        raise UserError(
            f"{first.mean.size} and {second.mean.size} features do not compare; take both from one "
            "extractor."
        )
    root = _symmetric_root(first.covariance)
    eigenvalues = _non_negative(np.linalg.eigvalsh(root @ second.covariance @ root))
    trace = np.trace(first.covariance) + np.trace(second.covariance)
    difference = first.mean - second.mean
    distance = difference @ difference + trace - 2 * np.sqrt(eigenvalues).sum()
    return max(float(distance), 0.0)


def _symmetric_root(matrix: np.ndarray) -> np.ndarray:
    values, vectors = np.linalg.eigh(matrix)
    return (vectors * np.sqrt(_non_negative(values))) @ vectors.T


def _non_negative(eigenvalues: np.ndarray) -> np.ndarray:
    if eigenvalues.min() < -_ROUNDING * max(eigenvalues.max(), 1.0):
        raise UserError(
            f"a covariance has the eigenvalue {eigenvalues.min():g}; it must have none below 0."
        )
    return np.maximum(eigenvalues, 0.0)


# ------------------------------------------------------------------------------
# Inception score (Salimans et al., 2016, 1606.03498) of class probabilities.
#
# Named after Inception-v3, whose probabilities it was first computed from. With another classifier
# it is another number: name the classifier with the result.


class InceptionScore(NamedTuple):
    """Mean and standard deviation over splits; 1 (worst) to the number of classes (best)."""

    mean: float
    deviation: float


def inception_score(probabilities: Float[np.ndarray, "N C"], num_splits: int = 1) -> InceptionScore:
    """exp of the mean over media of KL(p(class | medium) || p(class)), in each split.

    Args:
      probabilities: of the classes, each row adds up to 1.
      num_splits: parts of nearly equal size, in the order of the rows; p(class) is each part's own.

    Raises:
      UserError: if rows are not distributions, or there are fewer rows than splits.
    """
    if not 1 <= num_splits <= len(probabilities):
        raise UserError(
            f"num_splits={num_splits} does not go with {len(probabilities)} media; use 1 to "
            f"{max(len(probabilities), 1)} splits, and at least one medium."
        )
    rows = np.asarray(probabilities, np.float64)
    if not (np.all(rows >= 0) and np.allclose(rows.sum(axis=1), 1, atol=1e-3)):
        raise UserError(
            "each row of probabilities must be at least 0 everywhere and add up to 1; give the "
            "classifier's probabilities, not its logits."
        )
    scores = np.array([_score(part) for part in np.array_split(rows, num_splits)])
    return InceptionScore(float(scores.mean()), float(scores.std()))


def _score(rows: np.ndarray) -> float:
    # The mutual information of medium and class: H(class) - mean of H(class | medium).
    return float(np.exp(_entropy(rows.mean(axis=0, keepdims=True))[0] - _entropy(rows).mean()))


def _entropy(rows: np.ndarray) -> np.ndarray:
    return -(rows * np.log(np.where(rows > 0, rows, 1.0))).sum(axis=-1)
