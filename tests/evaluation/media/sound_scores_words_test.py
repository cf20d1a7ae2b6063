"""Error rates of transcripts equal an edit distance of our own."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatransformer_jax.config.option import UserError
from megatransformer_jax.evaluation.media.sound_scores import transcript_errors

TEXTS = st.lists(st.sampled_from(["a", "bc", "d"]), min_size=1, max_size=6).map(" ".join)


def distance(found, wanted):
    """Levenshtein's, row by row."""
    row = list(range(len(found) + 1))
    for i, item in enumerate(wanted, start=1):
        previous, row[0] = row[0], i
        for j, other in enumerate(found, start=1):
            previous, row[j] = row[j], min(previous + (item != other), row[j] + 1, row[j - 1] + 1)
    return row[-1]


@settings(max_examples=50, deadline=None, database=None)
@given(st.lists(st.tuples(st.one_of(st.just(""), TEXTS), TEXTS), min_size=1, max_size=4))
def test_rates_are_distances_over_lengths(pairs):
    found, wanted = zip(*pairs, strict=True)
    errors = transcript_errors(found, wanted)
    of_words = [distance(a.split(), b.split()) for a, b in pairs]
    assert errors.word_error_rate == pytest.approx(
        sum(of_words) / sum(len(text.split()) for text in wanted)
    )
    assert errors.character_error_rate == pytest.approx(
        sum(distance(a, b) for a, b in pairs) / sum(map(len, wanted))
    )
    assert errors.exact == sum(a == b for a, b in pairs) / len(pairs)
    assert errors.transcripts == len(pairs)


def test_only_blanks_are_forgiven():
    assert transcript_errors([" one  two "], ["one two"]).exact == 1
    assert transcript_errors(["One two"], ["one two"]).word_error_rate == 0.5


def test_wrong_input():
    with pytest.raises(UserError, match="0 transcripts do not go with 0"):
        transcript_errors([], [])
    with pytest.raises(UserError, match="1 transcripts do not go with 2"):
        transcript_errors(["a"], ["a", "b"])
    with pytest.raises(UserError, match="reference 2 has no word"):
        transcript_errors(["a", "b"], ["a", " "])
