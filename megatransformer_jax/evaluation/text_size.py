"""How much text a set of batches predicts, for scores that do not depend on the tokenizer.

A loss per token compares only between models with the same tokenizer. Per byte or per word of the
text it compares between all:

    bits per byte   = nats / (ln 2 * bytes)
    word perplexity = exp(nats / words)

where nats is the sum of the loss over all predicted tokens, also those that end documents.
"""

import dataclasses
import math
from collections.abc import Iterable, Sequence

import numpy as np

from megatransformer_jax.data.tokenizer import Tokenizer
from megatransformer_jax.types import Batch


@dataclasses.dataclass(frozen=True)
class TextSize:
    """Size of a text.

    Attributes:
      bytes: in UTF-8.
      words: runs of characters between blanks.
    """

    bytes: int
    words: int

    def bits_per_byte(self, nats: float) -> float:
        """From the sum of the loss over the text; NaN without text."""
        return nats / (math.log(2) * self.bytes) if self.bytes else math.nan

    def word_perplexity(self, nats: float) -> float:
        """From the sum of the loss over the text; NaN without words."""
        if not self.words:
            return math.nan
        return math.exp(nats / self.words) if nats / self.words < 700 else math.inf


def predicted_text_size(batches: Iterable[Batch], tokenizer: Tokenizer) -> TextSize:
    """Size of the text that the counting tokens of batches stand for.

    A document that was split goes on in the next segment, whose first token is not the start token;
    such parts are put together again, so that no word is counted twice.

    Args:
      batches: of packed or padded text, in the order of the pipeline.
      tokenizer: that made the tokens.
    """
    num_bytes = num_words = 0
    for document in _documents(batches, tokenizer.bos_id):
        text = tokenizer.decode(document)
        num_bytes += len(text.encode("utf-8"))
        num_words += len(text.split())
    return TextSize(num_bytes, num_words)


def _documents(batches: Iterable[Batch], bos_id: int) -> Iterable[Sequence[int]]:
    document: list[int] = []
    for first, targets in _segments(batches):
        if first == bos_id and document:
            yield document
            document = []
        document.extend(targets)
    if document:
        yield document


def _segments(batches: Iterable[Batch]) -> Iterable[tuple[int, list[int]]]:
    """First token and counting targets of every segment."""
    for batch in batches:
        rows = (batch.tokens, batch.targets, batch.loss_mask, batch.segment_ids)
        for tokens, targets, loss_mask, segments in zip(*map(np.asarray, rows), strict=True):
            for segment in range(1, int(segments.max(initial=0)) + 1):
                is_here = segments == segment
                if is_here.any():
                    counts = is_here & (loss_mask > 0)
                    yield int(tokens[is_here][0]), targets[counts].tolist()
