"""The bisection gives the cut that a sort gives."""

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from megatransformer_jax.generation.processors.processor import largest_threshold, ordered_keys

SHAPE = (2, 7)
floats = st.floats(width=32, allow_nan=False)
find = jax.jit(largest_threshold)


@settings(deadline=None)
@given(arrays(np.float32, SHAPE, elements=floats))
def test_keys_have_the_order_of_the_values(values: np.ndarray):
    values[0, 0], values[0, 1] = 0.0, -0.0
    with jax.disable_jit():
        keys = np.asarray(ordered_keys(jnp.asarray(values))).ravel()
    # XLA takes numbers too small for the normal format as zero.
    flat = np.where(np.abs(values) < np.finfo(np.float32).tiny, 0, values).ravel()
    for i in range(flat.size):
        np.testing.assert_array_equal(keys[i] < keys, flat[i] < flat)


@settings(max_examples=50, deadline=None)
@given(
    arrays(np.int32, SHAPE, elements=st.integers(-(2**31), 2**31 - 1)),
    arrays(np.int32, SHAPE, elements=st.integers(0, 4)),
    arrays(np.int32, SHAPE[:1], elements=st.integers(1, 30)),
)
def test_it_is_the_largest_key_that_reaches_the_target(keys, weights, targets):
    found = np.asarray(find(jnp.asarray(keys), jnp.asarray(weights), jnp.asarray(targets)))
    for row in range(len(keys)):
        reaching = [
            key for key in keys[row] if weights[row][keys[row] >= key].sum() >= targets[row]
        ]
        assert found[row, 0] == max(reaching, default=-(2**31))


def test_fewer_bits_for_small_keys():
    keys = jnp.array([[0, 1, 2, 3, 4]])
    found = largest_threshold(keys, jnp.ones((1, 1)), jnp.array([2]), lowest=0, num_bits=3)
    assert found.tolist() == [[3]]
