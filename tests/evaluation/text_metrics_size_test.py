"""The text that batches predict is measured as the documents were written."""

import math

import numpy as np
import pytest

from megatransformer_jax.data.packing import PackedRows, SpecialIds, stack
from megatransformer_jax.data.tokenizer import BytesTokenizer
from megatransformer_jax.evaluation.text_metrics import TextSize, predicted_text_size

TOKENIZER = BytesTokenizer()


@pytest.mark.parametrize("length", [5, 16, 64])
def test_split_documents_count_once(length):
    """Whether rows split words, or characters of several bytes, changes nothing."""
    texts = ["one word more", "\u20ac\u20ac\u20ac and  blanks\n", "last"]
    documents = [np.asarray(TOKENIZER.encode(text), np.int32) for text in texts]
    rows = list(PackedRows(lambda start: iter(documents[start:]), SpecialIds(0, 1, 2), length))
    batches = [stack(rows[first : first + 2]) for first in range(0, len(rows), 2)]
    size = predicted_text_size(batches, TOKENIZER)
    assert size.bytes == sum(len(text.encode()) for text in texts)
    assert size.words == sum(len(text.split()) for text in texts)


def test_what_does_not_count_is_left_out():
    documents = [np.asarray(TOKENIZER.encode("ab cd"), np.int32)]
    batch = stack(list(PackedRows(lambda start: iter(documents[start:]), SpecialIds(0, 1, 2), 8)))
    mask = np.asarray(batch.loss_mask).copy()
    mask[:, 2:] = 0
    assert predicted_text_size([batch._replace(loss_mask=mask)], TOKENIZER) == TextSize(2, 1)


def test_scores_per_text():
    size = TextSize(bytes=4, words=2)
    assert size.bits_per_byte(8 * math.log(2)) == pytest.approx(2.0)
    assert size.word_perplexity(2 * math.log(10)) == pytest.approx(10.0)
    assert size.word_perplexity(1e6) == math.inf
    empty = TextSize(0, 0)
    assert math.isnan(empty.bits_per_byte(1.0)) and math.isnan(empty.word_perplexity(1.0))
