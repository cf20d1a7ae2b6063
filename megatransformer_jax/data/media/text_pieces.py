"""Plain text for rows that have no media."""

import numpy as np

from megatransformer_jax.data.media.encoding import EncodedSample
from megatransformer_jax.data.sources.combine import Records
from megatransformer_jax.data.sources.record import BadRecord
from megatransformer_jax.data.tokenizer import Tokenizer


class TextPieces:
    """Documents cut into pieces that fill a row each; the last one of a document may be shorter.

    Every piece starts with the start token. A document's last one has the end token as its last
    target, the others the token that comes next.
    """

    def __init__(
        self, documents: Records[str | BadRecord], tokenizer: Tokenizer, sequence_length: int
    ):
        self._bos = tokenizer.bos_id
        self._size = sequence_length - 1  # The start token takes one place.
        self._documents = []
        self._pieces = []
        for number in range(len(documents)):
            text = documents[number]
            assert isinstance(text, str), "our own text has no bad records"
            ids = np.array([*tokenizer.encode(text), tokenizer.eos_id], np.int32)
            self._documents.append(ids)
            starts = range(0, max(len(ids) - 1, 1), max(self._size, 1))
            self._pieces += [(number, start) for start in starts]

    def __len__(self) -> int:
        return len(self._pieces)

    def __getitem__(self, index: int) -> EncodedSample:
        document, start = self._pieces[index]
        targets = self._documents[document][start : start + self._size + 1]
        tokens = np.concatenate(([self._bos], targets[:-1])).astype(np.int32)
        return EncodedSample(
            tokens=tokens,
            targets=targets,
            loss_mask=np.ones(len(tokens), np.float32),
            follows=np.zeros(len(tokens), np.int32),
        )
