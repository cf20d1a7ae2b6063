"""The fast argmax is an argmax."""

import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from megatransformer_jax.generation.processors.processor import argmax

scores = st.sampled_from([-np.inf, -1.5, 0.0, 0.5, 2.0])


@settings(deadline=None)
@given(arrays(np.float32, (3, 6), elements=scores))
def test_it_is_the_first_of_the_highest(rows: np.ndarray):
    np.testing.assert_array_equal(argmax(jnp.asarray(rows)), np.argmax(rows, axis=1))


def test_a_row_of_nan_gives_an_id():
    assert argmax(jnp.full((1, 5), jnp.nan)).tolist() == [4]
