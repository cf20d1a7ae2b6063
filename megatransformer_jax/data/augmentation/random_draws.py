"""Random numbers of one document or row, the same in every process, worker and resumed run."""

import enum

import numpy as np


class Purpose(enum.IntEnum):
    """What the numbers are for: each has a stream of its own.

    The values keep clear of the other streams of the data seed (orders, splits, problems).
    """

    BACK_TRANSLATION = 1 << 61
    SYNONYMS = (1 << 61) + 1
    TOKEN_DROPOUT = (1 << 61) + 2
    MEDIA_ROW = (1 << 61) + 3
    IMAGE_AUGMENTATION = (1 << 61) + 4
    AUDIO_AUGMENTATION = (1 << 61) + 5
    TONES = (1 << 61) + 6
    CROPS = (1 << 61) + 7
    SEGMENTS = (1 << 61) + 8
    MEDIA_TASKS = (1 << 61) + 9


def generator_of(seed: int, number: int, purpose: Purpose) -> np.random.Generator:
    """The generator of a document.

    Args:
      seed: `data.seed`.
      number: of the document in the stream of all epochs, so that each epoch draws anew.
      purpose: which stream.
    """
    # Philox counts up from the lowest word, so that documents never share numbers.
    counter = np.array([0, number, 0, 0], np.uint64)
    key = np.array([seed, purpose], np.uint64)
    return np.random.Generator(np.random.Philox(counter=counter, key=key))
