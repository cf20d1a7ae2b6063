"""Features and class probabilities of images: what FID and Inception score are computed from.

The published scores use Inception-v3, whose weights must be downloaded. The extractor here needs
none: a small network trained on the data set's own real images in a second. Its numbers compare
only with those of the same extractor, so that every result carries its name.
"""

from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float, Int
from sklearn.neural_network import MLPClassifier

from megatransformer_jax.config.option import UserError

_HIDDEN_UNITS = 64
_MAX_EPOCHS = 200


class Features(NamedTuple):
    """Of N images: features [N, K] and probabilities of the classes [N, C]."""

    features: Float[np.ndarray, "N K"]
    probabilities: Float[np.ndarray, "N C"]


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
        self._network = MLPClassifier(
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
