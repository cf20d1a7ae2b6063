"""Hears digits in mel spectrograms, independently of the model that made them."""

import numpy as np
from jaxtyping import Float, Int
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC

from megatransformer_jax.config.option import UserError
from megatransformer_jax.evaluation.media.features import check_labelled

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
        self._machine = make_pipeline(StandardScaler(), SVC(C=10.0, gamma="scale"))
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
