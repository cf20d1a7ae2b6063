"""Tokens are hidden where they are read and nowhere else, at the rate that was asked for."""

import numpy as np

from megatransformer_jax.data.augmentation.text import TokenDropout, ids_to_predict, ids_to_read
from megatransformer_jax.data.sources.record import BadRecord


def test_rate_place_and_targets():
    document = np.arange(20_000, dtype=np.int32)  # Id 0 can be hidden too.
    hidden = TokenDropout(0.3, seed=1).map_with_index(5, document)
    assert hidden.dtype == np.int32
    read = ids_to_read(hidden, 99_999)
    is_hidden = read == 99_999
    np.testing.assert_array_equal(read[~is_hidden], document[~is_hidden])
    np.testing.assert_array_equal(ids_to_predict(hidden), document)
    # Five standard deviations of a binomial share.
    assert abs(is_hidden.mean() - 0.3) < 5 * np.sqrt(0.3 * 0.7 / len(document))


def test_draws_follow_from_seed_and_number():
    document = np.arange(1000, dtype=np.int32)
    draws = {
        (seed, number): TokenDropout(0.5, seed).map_with_index(number, document).tobytes()
        for seed in (0, 1)
        for number in (0, 1, 2**40)
    }
    assert len(set(draws.values())) == 6
    assert TokenDropout(0.5, 1).map_with_index(1, document).tobytes() == draws[1, 1]


def test_a_bad_record_passes():
    record = BadRecord("a, line 1", "broken")
    assert TokenDropout(0.5, 0).map_with_index(0, record) is record
