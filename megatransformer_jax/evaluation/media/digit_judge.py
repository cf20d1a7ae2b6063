"""Reads digits in images, independently of the model that drew them."""

import numpy as np
from jaxtyping import Float, Int
from sklearn.svm import SVC

from megatransformer_jax.evaluation.media.features import check_labelled, flat_pixels


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
        # gamma='scale' suits pixels of any number and contrast; C=10 as digits hardly overlap.
        self._machine = SVC(C=10.0, gamma="scale")
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
