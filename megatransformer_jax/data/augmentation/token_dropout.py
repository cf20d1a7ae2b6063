"""Hides tokens of a document where they are read, but not where they are predicted.

Word dropout in the input (Bowman et al., arXiv 1511.06349, section 3.1): the model must guess from
what is left of the context. Only tokens of documents are hidden, so never a start token.

A hidden token t travels as its complement ~t, which is negative. So a document stays one array,
and packing splits and counts it as any other.
"""

import dataclasses
import typing

import grain
import numpy as np

from megatransformer_jax.data.augmentation.random_draws import Purpose, generator_of


@dataclasses.dataclass(frozen=True)
class TokenDropout(grain.transforms.MapWithIndex):
    """Hides each token with a probability. What is no array (a bad record) passes as it is.

    Attributes:
      rate: the probability.
      seed: `data.seed`.
    """

    rate: float
    seed: int

    def map_with_index(self, index: int, element: typing.Any) -> typing.Any:
        """Token ids int32 [n], some of them hidden; `index` is the document's number."""
        if not isinstance(element, np.ndarray):
            return element
        draws = generator_of(self.seed, index, Purpose.TOKEN_DROPOUT).random(len(element))
        return np.where(draws < self.rate, ~element, element)


def ids_to_read(document: np.ndarray, hidden_id: int) -> np.ndarray:
    """The ids that the model reads: `hidden_id` in place of hidden tokens."""
    return np.where(document < 0, hidden_id, document)


def ids_to_predict(document: np.ndarray) -> np.ndarray:
    """The ids that the model predicts: those of the text, hidden or not."""
    return np.where(document < 0, ~document, document)
