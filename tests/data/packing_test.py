"""Rows hold every token once, in place; documents are kept apart."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from megatransformer_jax.data.packing import PackedRows, PaddedRows, Row, SpecialIds

IDS = SpecialIds(pad=0, bos=1, eos=2)
corpora = st.lists(st.lists(st.integers(3, 50), max_size=30), max_size=12)
lengths = st.integers(1, 20)


def opener(documents: list[list[int]]):
    arrays = [np.array(document, np.int32) for document in documents]
    return lambda start: iter(arrays[start:])


def segments(rows: list[Row]) -> list[tuple[list[int], list[int]]]:
    """Read and predicted ids of each segment, in order; checks what all rows have in common."""
    found = []
    for row in rows:
        used = row.segment_ids > 0
        assert used[0]
        np.testing.assert_array_equal(row.loss_mask, used.astype(np.float32))
        assert (row.tokens[~used] == IDS.pad).all()
        assert (row.targets[~used] == IDS.pad).all()
        assert (row.positions[~used] == 0).all()
        assert not used[np.argmin(used) :].any() or used.all()
        for segment in range(1, row.segment_ids.max() + 1):
            place = np.flatnonzero(row.segment_ids == segment)
            assert len(place)
            np.testing.assert_array_equal(place, np.arange(place[0], place[-1] + 1))
            np.testing.assert_array_equal(row.positions[place], np.arange(len(place)))
            found.append((row.tokens[place].tolist(), row.targets[place].tolist()))
    return found


@given(corpora, lengths)
def test_packed_rows_hold_every_token_once(documents: list[list[int]], length: int):
    rows = list(PackedRows(opener(documents), IDS, length))
    whole = [([IDS.bos, *tokens], [*tokens, IDS.eos]) for tokens in documents if tokens]
    for tokens, targets in segments(rows):
        # A piece continues the current document; a document ends before the next begins.
        expected_tokens, expected_targets = whole[0]
        assert tokens == expected_tokens[: len(tokens)]
        assert targets == expected_targets[: len(targets)]
        whole[0] = expected_tokens[len(tokens) :], expected_targets[len(tokens) :]
        if not whole[0][0]:
            whole.pop(0)
    assert not whole
    for row in rows[:-1]:
        assert row.segment_ids.all()


@given(corpora, lengths)
def test_padded_rows_hold_one_document_each(documents: list[list[int]], length: int):
    rows = PaddedRows(opener(documents), IDS, length)
    expected = [
        ([IDS.bos, *tokens][:length], [*tokens, IDS.eos][:length]) for tokens in documents if tokens
    ]
    assert segments(list(rows)) == expected
    excess = [len(tokens) + 1 - length for tokens in documents if tokens]
    assert rows.cuts.num_cut == sum(count > 0 for count in excess)
    assert rows.cuts.tokens_lost == sum(count for count in excess if count > 0)


@given(corpora, lengths, st.integers(0, 40))
def test_rows_resume_from_their_state(documents: list[list[int]], length: int, stop: int):
    for rows_class in (PackedRows, PaddedRows):
        rows = rows_class(opener(documents), IDS, length)
        for _ in zip(range(stop), rows, strict=False):
            pass
        resumed = rows_class(opener(documents), IDS, length)
        resumed.set_state(rows.get_state())
        for one, other in zip(rows, resumed, strict=True):
            for left, right in zip(one, other, strict=True):
                np.testing.assert_array_equal(left, right)
        assert rows.get_state() == resumed.get_state()


def test_cut_documents_are_logged(caplog):
    list(PaddedRows(opener([[5] * 9]), IDS, 4))
    assert "cut 1 documents at data.sequence_length=4 so far and lost 6 tokens" in caplog.text


def test_a_row_by_hand():
    row = next(PackedRows(opener([[7, 8], [], [9]]), IDS, 6))
    assert row.tokens.tolist() == [1, 7, 8, 1, 9, 0]
    assert row.targets.tolist() == [7, 8, 2, 9, 2, 0]
    assert row.loss_mask.tolist() == [1, 1, 1, 1, 1, 0]
    assert row.segment_ids.tolist() == [1, 1, 1, 2, 2, 0]
    assert row.positions.tolist() == [0, 1, 2, 0, 1, 0]
