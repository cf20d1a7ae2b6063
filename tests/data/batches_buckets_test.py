"""Buckets hold every document once, in rows that suit it, and resume anywhere."""

import dataclasses
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatransformer_jax.config.data import DataConfig, TokenizerConfig
from megatransformer_jax.data.batches import BucketBatches, Share
from megatransformer_jax.data.packing import SpecialIds
from megatransformer_jax.data.pipeline import build_pipeline, validation_batches
from megatransformer_jax.data.tokenizer import BytesTokenizer
from megatransformer_jax.types import Batch

IDS = SpecialIds(pad=0, bos=1, eos=2)
SHAPES = ((6, 4), (4, 6), (2, 12))
corpora = st.lists(st.lists(st.integers(3, 50), max_size=16), max_size=40)


class Corpus:
    """Stands in for `Documents`."""

    def __init__(self, documents: list[list[int]]):
        self._documents = [np.array(document, np.int32) for document in documents]

    def open(self, start: int):
        yield from self._documents[start:]

    def at(self, number: int) -> np.ndarray:
        return self._documents[number]

    def close(self) -> None:
        pass


def stream(documents: list[list[int]], shapes=SHAPES, share: Share | None = None) -> BucketBatches:
    return BucketBatches(Corpus(documents), IDS, shapes, share or Share(2))


def _drain(batches: BucketBatches) -> list[Batch]:
    found = []
    while True:
        try:
            found.append(next(batches))
        except StopIteration:
            return found


@given(corpora)
def test_every_document_is_once_in_the_shortest_row_that_it_fits(documents: list[list[int]]):
    batches = stream(documents)
    seen = []
    for batch in _drain(batches):
        assert batch.tokens.shape in SHAPES
        length = batch.tokens.shape[1]
        shorter = max((other for _, other in SHAPES if other < length), default=0)
        for row in range(len(batch.tokens)):
            used = int(batch.segment_ids[row].sum())
            assert set(batch.segment_ids[row, :used]) <= {1}
            np.testing.assert_array_equal(batch.loss_mask[row] > 0, batch.segment_ids[row] > 0)
            if used:
                assert used > shorter
                seen.append((batch.tokens[row, :used].tolist(), batch.targets[row, :used].tolist()))
    wanted = [([IDS.bos, *d][:12], [*d, IDS.eos][:12]) for d in documents if d]
    assert sorted(seen) == sorted(wanted)
    assert batches.cuts.num_cut == sum(len(document) > 11 for document in documents)


@given(corpora, st.integers(0, 12))
def test_a_state_is_small_and_resumes_bit_for_bit(documents: list[list[int]], stop: int):
    batches = stream(documents)
    for _ in zip(range(stop), iter(batches.__next__, None), strict=False):
        pass
    state = json.loads(json.dumps(batches.get_state()))
    assert len(state["waiting"]) < sum(rows for rows, _ in SHAPES)
    resumed = stream(documents)
    resumed.set_state(state)
    assert resumed.get_state() == state
    for one, other in zip(_drain(batches), _drain(resumed), strict=True):
        for left, right in zip(one, other, strict=True):
            np.testing.assert_array_equal(left, right)
    assert batches.get_state() == resumed.get_state()


def test_batches_by_hand():
    # Rows of 2 and of 4 positions; a batch has two of the shorter or one of the longer.
    batches = stream([[5], [6, 7], [8], [9]], ((2, 2), (1, 4)), Share(1))
    longer, shorter, rest = _drain(batches)
    assert longer.tokens.tolist() == [[1, 6, 7, 0]]
    assert longer.targets.tolist() == [[6, 7, 2, 0]]
    assert shorter.tokens.tolist() == [[1, 5], [1, 8]]
    assert rest.tokens.tolist() == [[1, 9], [0, 0]]
    assert rest.loss_mask.tolist() == [[1, 1], [0, 0]]


def test_shapes_follow_from_the_options():
    config = DataConfig(packing="bucket", batch_size=4, sequence_length=256)
    assert config.batch_shapes == ((32, 32), (16, 64), (8, 128), (4, 256))
    assert dataclasses.replace(config, sequence_length=6).batch_shapes == ((8, 3), (4, 6))
    own = dataclasses.replace(config, bucket_lengths=(100, 256))
    assert own.batch_shapes == ((8, 100), (4, 256))
    assert dataclasses.replace(config, packing="pad").batch_shapes == ((4, 256),)


@pytest.fixture(scope="module")
def text() -> DataConfig:
    return DataConfig(
        tokenizer=TokenizerConfig(kind="bytes"), packing="pad", batch_size=2, sequence_length=8192
    )


def test_less_of_the_embedded_text_is_padding(text: DataConfig):
    """Measured over 40 batches: 60% of the positions with pad, 17% with bucket."""
    shares = {}
    for packing in ("pad", "bucket"):
        config = dataclasses.replace(text, packing=packing)
        with build_pipeline(config, BytesTokenizer(), split="train") as batches:
            masks = [next(batches).loss_mask for _ in range(40)]
        shares[packing] = 1 - sum(mask.sum() for mask in masks) / sum(mask.size for mask in masks)
    assert shares["bucket"] < 0.6 * shares["pad"]


def test_validation_has_the_documents_of_padded_rows(text: DataConfig):
    def documents(packing: str) -> list[list[int]]:
        config = dataclasses.replace(text, packing=packing)
        found = validation_batches(config, BytesTokenizer())
        rows = [row[row != 0].tolist() for batch in found for row in batch.tokens]
        return sorted(row for row in rows if row)

    assert documents("bucket") == documents("pad")
